"""Takes a picture apart: its background, what stands out from it, and the connected pieces of that.

H height  W width  N pixels; pictures here are float32 RGB, 0..255, HWC.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.intp]
Values = TypeVar("Values", Array, Mask)

SIDE = 128  # pictures clearly above are averaged down to it
STANDS_OUT = 36.0  # RGB distance from the background, 0..255 scale; noise of sigma 5 stays below
_EXPLAINED = 25.0  # a pixel so near to the fitted background belongs to it


def reduced(picture_HWC: npt.NDArray[np.uint8]) -> Array:
    """The picture averaged down to SIDE if it is clearly larger, as floats."""
    side = picture_HWC.shape[0]
    if side <= SIDE * 1.25:
        return picture_HWC.astype(np.float32)
    edges = np.arange(SIDE + 1) * side // SIDE
    counts = np.diff(edges).astype(np.float32)
    rows = np.add.reduceat(picture_HWC, edges[:-1], axis=0, dtype=np.float32) / counts[:, None, None]
    averaged: Array = np.add.reduceat(rows, edges[:-1], axis=1) / counts[None, :, None]
    return averaged


def fitted_background(picture_HWC: Array) -> tuple[Array, Array]:
    """The plane (per channel) through the background, and its 3 x 3 coefficients: at the centre, per x, per y.

    Robust: planes through parts of the frame of one pixel compete for what they explain of all of it; then every
    pixel votes that the winner explains.
    """
    height, width, _ = picture_HWC.shape
    y_HW, x_HW = np.mgrid[0:height, 0:width].astype(np.float32)
    axes = np.stack([np.ones_like(x_HW), (x_HW + 0.5) / width - 0.5, (y_HW + 0.5) / height - 0.5], -1)
    top, bottom, left, right = y_HW == 0, y_HW == height - 1, x_HW == 0, x_HW == width - 1
    is_frame = top | bottom | left | right
    axes_N3, colors_N3 = axes[is_frame], picture_HWC[is_frame]
    # All sides; all but one, should a thing touch that; two that meet, should a thing touch the corner across.
    away = [top & bottom, top, bottom, left, right, top | left, top | right, bottom | left, bottom | right]
    parts = [~side[is_frame] for side in away]
    planes = [_plane_through(axes_N3[part], colors_N3[part]) for part in parts]
    plane = max(planes, key=lambda plane: _explained(axes_N3, colors_N3, plane).sum())
    for _ in range(2):
        is_explained = _explained(axes, picture_HWC, plane)
        if is_explained.sum() < len(axes_N3):
            break
        plane = _plane_through(axes[is_explained], picture_HWC[is_explained])
    return axes @ plane, plane


def _plane_through(axes_N3: Array, colors_N3: Array) -> Array:
    normal = axes_N3.T @ axes_N3 + 1e-4 * np.eye(3, dtype=np.float32)
    plane: Array = np.linalg.solve(normal, axes_N3.T @ colors_N3)
    return plane


def _explained(axes: Array, colors: Array, plane: Array) -> Mask:
    is_explained: Mask = np.linalg.norm(colors - axes @ plane, axis=-1) < _EXPLAINED
    return is_explained


def standing_out(difference_HW: Array) -> Mask:
    """Pixels at least half as far from the background as their neighbourhood: edges are cut at half coverage."""
    mask_HW: Mask = (difference_HW > STANDS_OUT) & (difference_HW > 0.5 * widened(difference_HW))
    return mask_HW


def widened(values_HW: Values) -> Values:
    """The greatest value of each 3 x 3 neighbourhood."""
    padded = np.pad(values_HW, 1, mode="edge")
    rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    greatest: Values = np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
    return greatest


def labelled(mask_HW: Mask) -> tuple[Labels, int]:
    """Numbers the connected pieces (corners connect) from 1; 0 is no piece. Joins the runs of neighbouring rows."""
    height, width = mask_HW.shape
    steps = np.diff(np.pad(mask_HW, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    stops = np.nonzero(steps == -1)[1]
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    first_of_row = np.searchsorted(rows, np.arange(height + 1)).tolist()
    start_list, stop_list = starts.tolist(), stops.tolist()
    for row in range(1, height):
        above, here = first_of_row[row - 1], first_of_row[row]
        while above < first_of_row[row] and here < first_of_row[row + 1]:
            if start_list[here] <= stop_list[above] and start_list[above] <= stop_list[here]:
                parents[root(here)] = root(above)
            if stop_list[above] < stop_list[here]:
                above += 1
            else:
                here += 1
    roots = np.array([root(run) for run in range(len(rows))], np.intp)
    distinct, numbers = np.unique(roots, return_inverse=True)
    labels_HW = np.zeros((height, width), np.intp)
    labels_HW[mask_HW] = np.repeat(numbers + 1, stops - starts)
    return labels_HW, len(distinct)
