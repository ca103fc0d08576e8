"""Draws a scene at any size from the signed distances of its shapes, anti-aliased; any window equals the whole's slice.

H height  W width; pictures here are uint8 RGB, 0..255, HWC.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from floyd.scenes.scene import NEW_SHAPES, SHAPES, Scene, Thing, color_255

# All in radii of the thing.
SQUARE_HALF_SIDE = 0.88
TRIANGLE_HALF_HEIGHT = math.sqrt(3) / 2  # equilateral, its side is two radii
STAR_NOTCH = 0.48  # radius of the inner corners
CROSS_HALF_LENGTH = 0.96
CROSS_HALF_WIDTH = 0.32
RING_HOLE = 0.55
CRESCENT_HOLE = 0.78
CRESCENT_RISE = 0.5  # of the hole's centre over the disc's: the crescent lies like a bowl

F = np.float32
Array = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]


def coverage(shape: str, x_HW: Array, y_HW: Array, radius: float) -> Array:
    """The covered share of each pixel, 0..1; x, y are pixel centres from the thing's centre, all in pixels.

    From the signed distances of the outline's lines; where lines cross, the product of their shares.
    Only operations that IEEE rounds exactly, so that a pixel's value does not depend on its neighbours.
    """
    if shape in ("circle", "ring"):
        distance_HW = np.sqrt(x_HW * x_HW + y_HW * y_HW)
        disc_HW = _inside(distance_HW - F(radius))
        return disc_HW if shape == "circle" else disc_HW - _inside(distance_HW - F(radius * RING_HOLE))
    if shape == "crescent":
        disc_HW = _inside(np.sqrt(x_HW * x_HW + y_HW * y_HW) - F(radius))
        above_HW = y_HW + F(radius * CRESCENT_RISE)
        return disc_HW * (F(1) - _inside(np.sqrt(x_HW * x_HW + above_HW * above_HW) - F(radius * CRESCENT_HOLE)))
    if shape == "square":
        return _box(x_HW, y_HW, radius * SQUARE_HALF_SIDE, radius * SQUARE_HALF_SIDE)
    if shape == "triangle":
        half_height = F(radius * TRIANGLE_HALF_HEIGHT)
        across_HW, along_HW = x_HW * F(math.sqrt(3) / 2), (y_HW + half_height) * F(0.5)
        return _inside(across_HW - along_HW) * _inside(-across_HW - along_HW) * _inside(y_HW - half_height)
    if shape == "cross":
        length, width = radius * CROSS_HALF_LENGTH, radius * CROSS_HALF_WIDTH
        both_HW = _box(x_HW, y_HW, length, width) + _box(x_HW, y_HW, width, length)
        return both_HW - _box(x_HW, y_HW, width, width)
    if shape == "star":
        return _star(x_HW, y_HW, radius)
    raise ValueError(f"shape must be one of {', '.join(SHAPES + NEW_SHAPES)}, got {shape!r}.")


def _inside(distance_HW: Array) -> Array:
    """The covered share of a pixel at this signed distance, negative inside, of a straight outline."""
    share_HW: Array = np.clip(F(0.5) - distance_HW, F(0), F(1))
    return share_HW


def _box(x_HW: Array, y_HW: Array, half_width: float, half_height: float) -> Array:
    return _inside(np.abs(x_HW) - F(half_width)) * _inside(np.abs(y_HW) - F(half_height))


def _star(x_HW: Array, y_HW: Array, radius: float) -> Array:
    """Folds the plane onto the right half of the upper point, where the outline is a single line."""
    x_HW, y_HW = np.abs(x_HW), -y_HW  # y upwards
    across_x, across_y = F(math.cos(math.radians(36))), F(-math.sin(math.radians(36)))  # to the notch's direction
    for _ in range(2):
        beyond_HW = F(2) * np.maximum(x_HW * across_x + y_HW * across_y, F(0))
        x_HW, y_HW = np.abs(x_HW - beyond_HW * across_x), y_HW - beyond_HW * across_y
    notch_x, notch_y = STAR_NOTCH * math.sin(math.radians(36)), STAR_NOTCH * math.cos(math.radians(36))
    length = math.hypot(notch_x, 1 - notch_y)
    across_HW, along_HW = x_HW * F((1 - notch_y) / length), (y_HW - F(radius)) * F(notch_x / length)
    return _inside(along_HW + across_HW) * _inside(along_HW - across_HW)


def render(scene: Scene, size: int) -> Picture:
    """The whole picture, uint8, size x size x 3."""
    return render_crop(scene, size, 0, 0, size, size)


def render_crop(scene: Scene, size: int, top: int, left: int, height: int, width: int) -> Picture:
    """A window of the size x size picture: `render(scene, size)[top:top + height, left:left + width]`, bit for bit."""
    if size < 1 or height < 1 or width < 1 or top < 0 or left < 0 or top + height > size or left + width > size:
        raise ValueError(
            f"the window must lie in the picture of {size} x {size}, "
            f"got top={top}, left={left}, height={height}, width={width}."
        )
    picture_HWC = np.empty((height, width, 3), np.float32)
    picture_HWC[:] = _background(scene, size, top, left, height, width)
    for thing in scene.things:
        _draw(picture_HWC, thing, size, top, left)
    picture_HWC += F(0.5)
    return picture_HWC.astype(np.uint8)


def _background(scene: Scene, size: int, top: int, left: int, height: int, width: int) -> Array:
    """Broadcastable to the window."""
    background = scene.background
    first = color_255(background.color)
    if background.second_color is None:
        return first
    is_vertical = background.direction == "vertical"
    start, count = (top, height) if is_vertical else (left, width)
    along = (np.arange(start, start + count, dtype=np.float32) + F(0.5)) / F(size)
    line: Array = first + along[:, None] * (color_255(background.second_color) - first)
    return line[:, None, :] if is_vertical else line[None, :, :]


def _draw(picture_HWC: Array, thing: Thing, size: int, top: int, left: int) -> None:
    """Lays the thing over the window, in place; touches only its box."""
    height, width, _ = picture_HWC.shape
    x, y, radius = thing.x * size, thing.y * size, thing.radius * size
    first_row, last_row = max(math.floor(y - radius) - 1, top), min(math.ceil(y + radius) + 1, top + height)
    first_col, last_col = max(math.floor(x - radius) - 1, left), min(math.ceil(x + radius) + 1, left + width)
    if first_row >= last_row or first_col >= last_col:
        return
    y_H1 = (np.arange(first_row, last_row, dtype=np.float32) + F(0.5 - y))[:, None]
    x_1W = (np.arange(first_col, last_col, dtype=np.float32) + F(0.5 - x))[None, :]
    cover_HW1 = coverage(thing.shape, x_1W, y_H1, radius)[:, :, None]
    window = picture_HWC[first_row - top : last_row - top, first_col - left : last_col - left]
    window += cover_HW1 * (color_255(thing.color) - window)
