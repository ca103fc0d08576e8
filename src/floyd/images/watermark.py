"""IF's watermark, drawn into the lower right corner."""

from __future__ import annotations

import numpy as np
from PIL import Image

FULL_SIDE, FULL_MARGIN = 62, 14  # pixels, on a picture of 1024 x 1024


def watermark_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Where the watermark of a picture lies (left, upper, right, lower): always within it, and never empty.

    It scales with the root of the picture's area, as far as a small or a narrow picture has room for it. The incumbent
    places that of a picture below the model's own size outside of it, and fails where none would fill a pixel.
    """
    scale = (width * height / 1024**2) ** 0.5
    side = min(max(int(scale * FULL_SIDE), 1), width, height)
    margin = int(FULL_MARGIN * scale)
    right, lower = max(width - margin, side), max(height - margin, side)
    return right - side, lower - side, right, lower


def draw(picture: Image.Image, watermark: np.ndarray) -> Image.Image:
    """The picture with the watermark ([H, W, 4], uint8) on it."""
    if watermark.dtype != np.uint8 or watermark.ndim != 3 or watermark.shape[2] != 4:
        raise ValueError(f"A watermark is [H, W, 4] of uint8, got {list(watermark.shape)} of {watermark.dtype}.")
    marked = picture.copy()
    left, upper, right, lower = watermark_box(*picture.size)
    mark = Image.fromarray(watermark).resize((right - left, lower - upper), Image.Resampling.BICUBIC)
    marked.paste(mark, (left, upper, right, lower), mask=mark.getchannel("A"))
    return marked
