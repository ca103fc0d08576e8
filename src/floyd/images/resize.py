"""At which size a picture enters a stage.

B images  C channels  H height  W width
"""

from __future__ import annotations

import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def short_side_size(width: int, height: int, side: int, *, multiple: int = 8) -> tuple[int, int]:
    """(width, height) with the short side at `side` and the long one at the nearest multiple that keeps the shape.

    `multiple` is what the model's levels ask for: 8 in stage I, 16 in stage II (the incumbent rounds to 8 in both).
    """
    if side < 1 or side % multiple:
        raise ValueError(f"The short side must be a positive multiple of {multiple}, got {side}.")
    ratio = width / height
    if ratio >= 1:
        return round(side / multiple * ratio) * multiple, side
    return side, round(side / multiple / ratio) * multiple


def resize_short_side(picture: Image.Image, side: int, *, multiple: int = 8) -> Image.Image:
    """The shape is kept but for the rounding; nothing is cropped."""
    size = short_side_size(*picture.size, side, multiple=multiple)
    return picture.resize(size, Image.Resampling.BICUBIC)


def floored_size(width: int, height: int, *, multiple: int) -> tuple[int, int]:
    if min(width, height) < multiple:
        raise ValueError(f"A picture must be at least {multiple} px wide and high, got {width}x{height}.")
    return width // multiple * multiple, height // multiple * multiple


def floor_picture(picture: Image.Image, *, multiple: int) -> Image.Image:
    """Shrunk to the next lower multiple: stage III's rule for PIL pictures."""
    return picture.resize(floored_size(*picture.size, multiple=multiple), Image.Resampling.BICUBIC)


def floor_tensor(x_BCHW: Tensor, *, multiple: int) -> Tensor:
    """Shrunk to the next lower multiple by leaving out pixels: stage III's rule for arrays and tensors."""
    width, height = floored_size(x_BCHW.shape[3], x_BCHW.shape[2], multiple=multiple)
    return x_BCHW if (height, width) == tuple(x_BCHW.shape[2:]) else F.interpolate(x_BCHW, (height, width))
