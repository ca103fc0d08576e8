"""What an inpainting keeps comes back as it was given: in its own numbers, and at its own size.

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from floyd.diffusion.canvas import Canvas
from floyd.images.composite import each, each_mask, put_back, repeated, size_of
from floyd.images.convert import to_output
from floyd.images.watermark import draw
from floyd.pipelines.finish import Finished

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from floyd.images.convert import Picture, Pictures
    from floyd.images.mask import Mask

    Images = list[Image] | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class Kept:
    """The pictures of a call as they were given, one for each prompt, and where the canvas keeps them."""

    pictures: list[Picture]
    masks: list[Mask]
    canvas: Canvas

    @classmethod
    def of(cls, picture: Pictures, mask_image: Mask | Sequence[Mask], canvas: Canvas) -> Kept:
        return cls(each(picture), each_mask(mask_image), canvas)

    def images(self, done: Finished, output_type: str) -> Images:
        """At the size of the canvas. Tensors and bytes keep every bit by themselves; [-1, 1] to [0, 1] rounds."""
        images = done.images(output_type)
        if output_type != "np" or not self._is_unresized:
            return images
        return put_back(images, self.pictures, self._masks(done, self._of_canvas(len(images))))

    def full_size(self, done: Finished, output_type: str) -> Images:
        """At the size of the given pictures."""
        if self._is_unresized:
            return self.images(done, output_type)
        painted = to_output(done.picture_BCHW, output_type)  # type: ignore[arg-type]
        images = put_back(painted, self.pictures, self._masks(done, repeated(self.masks, len(painted), "mask_image")))
        if output_type != "pil" or done.watermark is None:
            return images
        return [draw(image, done.watermark) for image in images]

    @property
    def _is_unresized(self) -> bool:
        return all(size_of(picture) == self.canvas.sides for picture in self.pictures)

    def _of_canvas(self, count: int) -> list[Any]:
        assert self.canvas.mask_B1HW is not None, "an inpainting has a mask"
        mask_BHW = self.canvas.cropped(self.canvas.mask_B1HW)[:, 0]
        return list(mask_BHW.expand(count, -1, -1))

    def _masks(self, done: Finished, masks: list[Any]) -> list[Any]:
        """Nothing is put back into a picture that the safety checker's verdict hid."""
        hidden = done.hidden or [False] * len(masks)
        return [torch.ones(self._size(i, len(masks))) if hide else masks[i] for i, hide in enumerate(hidden)]

    def _size(self, place: int, count: int) -> tuple[int, int]:
        return size_of(repeated(self.pictures, count, "picture")[place])
