"""Whatever Pillow can open, upright and in three channels of eight bits."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

WIDE_MODES = ("I", "F")  # Pillow cuts these off at 255 without a word


def upright(picture: Image.Image) -> Image.Image:
    """Turned as the camera's orientation tag asks."""
    return ImageOps.exif_transpose(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Transparency is dropped, not blended: the colours below it appear."""
    return _eight_bits(picture).convert("RGB")


def to_gray(picture: Image.Image) -> Image.Image:
    picture = _eight_bits(picture)
    return (picture.convert("RGB") if picture.mode == "LAB" else picture).convert("L")


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(picture.convert("I")) / 257).astype(np.uint8))
    if picture.mode in WIDE_MODES:
        low, high = np.asarray(picture).min(), np.asarray(picture).max()
        if not 0 <= low <= high <= 255 or 0 < high <= 1:  # a range of 0..1 would come out black
            raise ValueError(f"A picture of mode {picture.mode} must hold 0..255, got {low}..{high}: scale it first.")
    if picture.mode == "La":
        return picture.convert("LA")
    if picture.mode in ("P", "PA") and "transparency" in picture.info:
        return picture.convert("RGBA")
    return picture
