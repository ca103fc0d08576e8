"""At which size a picture enters a stage."""

from __future__ import annotations

from PIL import Image


def short_side_size(width: int, height: int, side: int, *, multiple: int = 8) -> tuple[int, int]:
    """(width, height) with the short side at `side` and the long one at the nearest multiple that keeps the shape.

    The incumbent's multiple is 8 in both stages.
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
