"""What a pipeline returns: readable by name, by key and by place, as scripts written for the incumbent do it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    Images = list[Image] | np.ndarray | Tensor


class Output:
    """`output.images`, `output["images"]` and `output[0]` are one thing; fields that hold None have no place."""

    def keys(self) -> tuple[str, ...]:
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]

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

    images: Images
    nsfw_detected: list[bool] | None = None
    watermark_detected: list[bool] | None = None


@dataclass(eq=False)
class StableDiffusionPipelineOutput(Output):
    """Stage III: the pictures, and what the safety checker says of each (None without a checker)."""

    images: Images
    nsfw_content_detected: list[bool] | None = None
