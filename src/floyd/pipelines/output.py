"""What a pipeline returns: readable by name, by key and by place, as scripts written for the incumbent do it.

What the incumbent does not tell is found by name alone, so that a script which unpacks an output finds the places it
knows. Scores are the safety checker's logits, one for each picture; what is above 0.5 is detected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    Images = list[Image] | np.ndarray | Tensor


class Output:
    """`output.images`, `output["images"]` and `output[0]` are one thing; fields that hold None have no place."""

    places: ClassVar[tuple[str, ...]]

    def keys(self) -> tuple[str, ...]:
        return tuple(name for name in self.places if getattr(self, name) is not None)

    def values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        return self.values()

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return dict(self.items())[key]
        return self.values()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()


@dataclass(eq=False)
class IFPipelineOutput(Output):
    """A stage of IF: the pictures, and what the safety checker says of each (None without a checker)."""

    places: ClassVar[tuple[str, ...]] = ("images", "nsfw_detected", "watermark_detected")

    images: Images
    nsfw_detected: list[bool] | None = None
    watermark_detected: list[bool] | None = None
    nsfw_scores: list[float] | None = None
    watermark_scores: list[float] | None = None


@dataclass(eq=False)
class IFInpaintingOutput(IFPipelineOutput):
    """The same, of an inpainting: what the mask keeps can be had at the size of the given pictures."""

    enlarged: Callable[[], Images] | None = None

    def full_size(self) -> Images:
        """The given pictures at their own size, with what was painted enlarged into them; the rest is theirs to the
        last bit. They are of the kind that `images` are."""
        if self.enlarged is None:
            raise ValueError("This output does not know which pictures were given; put_back() puts images into any.")
        return self.enlarged()


@dataclass(eq=False)
class StableDiffusionPipelineOutput(Output):
    """Stage III: the pictures, and what the safety checker says of each (None without a checker)."""

    places: ClassVar[tuple[str, ...]] = ("images", "nsfw_content_detected")

    images: Images
    nsfw_content_detected: list[bool] | None = None
    watermark_detected: list[bool] | None = None
    nsfw_scores: list[float] | None = None
    watermark_scores: list[float] | None = None
