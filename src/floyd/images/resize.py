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


def square(picture: Image.Image, side: int, *, place: float = 0.5, is_flipped: bool = False) -> Image.Image:
    """The largest square of a picture, at `place` (0..1) along its longer side, brought to side x side."""
    if not 0 <= place <= 1:
        raise ValueError(f"place must be in [0, 1], got {place}.")
    short = min(picture.size)
    left, top = ((length - short) * place for length in picture.size)
    box = (left, top, left + short, top + short)
    cut = picture.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else cut
