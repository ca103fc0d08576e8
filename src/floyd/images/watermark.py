"""IF's watermark, drawn into the lower right corner."""

from __future__ import annotations

import logging

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

FULL_SIDE, FULL_MARGIN = 62, 14  # pixels, on a picture of 1024 x 1024


def watermark_box(width: int, height: int) -> tuple[int, int, int, int] | None:
    """Where the watermark of a picture lies (left, upper, right, lower); None where it would not fill one pixel.

    It scales with the root of the picture's area. A picture smaller than the model's own size gets one, too:
    the incumbent places that one outside of the picture.
    """
    scale = (width * height / 1024**2) ** 0.5
    side, margin = int(scale * FULL_SIDE), int(FULL_MARGIN * scale)
    right, lower = width - margin, height - margin
    is_visible = side > 0 and right >= side and lower >= side
    return (right - side, lower - side, right, lower) if is_visible else None


def draw(picture: Image.Image, watermark: np.ndarray) -> Image.Image:
    """The picture with the watermark ([H, W, 4], uint8) on it; too small a picture is logged and left without."""
    if watermark.dtype != np.uint8 or watermark.ndim != 3 or watermark.shape[2] != 4:
        raise ValueError(f"A watermark is [H, W, 4] of uint8, got {list(watermark.shape)} of {watermark.dtype}.")
    marked = picture.copy()
    box = watermark_box(*picture.size)
    if box is None:
        width, height = picture.size
        logger.warning("A picture of %dx%d px is too small for a watermark: it is left without.", width, height)
        return marked
    side = box[2] - box[0]
    mark = Image.fromarray(watermark).resize((side, side), Image.Resampling.BICUBIC)
    marked.paste(mark, box, mask=mark.getchannel("A"))
    return marked
