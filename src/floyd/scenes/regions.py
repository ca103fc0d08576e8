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

    Robust: starts from the frame of one pixel, then lets every pixel vote that the plane explains.
    """
    height, width, _ = picture_HWC.shape
    y_HW, x_HW = np.mgrid[0:height, 0:width].astype(np.float32)
    axes = np.stack([np.ones_like(x_HW), (x_HW + 0.5) / width - 0.5, (y_HW + 0.5) / height - 0.5], -1)
    is_frame = np.zeros((height, width), bool)
    is_frame[[0, -1], :] = is_frame[:, [0, -1]] = True
    axes_N3, colors_N3 = axes[is_frame], picture_HWC[is_frame]
    weights_N = np.ones(len(axes_N3), np.float32)
    for _ in range(6):
        plane = _weighted_plane(axes_N3, colors_N3, weights_N)
        misses_N = np.linalg.norm(colors_N3 - axes_N3 @ plane, axis=1)
        weights_N = 1 / (1 + (misses_N / 15) ** 2)
    for _ in range(2):
        is_explained = np.linalg.norm(picture_HWC - axes @ plane, axis=-1) < _EXPLAINED
        if is_explained.sum() < len(axes_N3):
            break
        plane = _weighted_plane(axes[is_explained], picture_HWC[is_explained])
    return axes @ plane, plane


def _weighted_plane(axes_N3: Array, colors_N3: Array, weights_N: Array | None = None) -> Array:
    weighted_N3 = axes_N3 if weights_N is None else axes_N3 * weights_N[:, None]
    normal = weighted_N3.T @ axes_N3 + 1e-4 * np.eye(3, dtype=np.float32)
    plane: Array = np.linalg.solve(normal, weighted_N3.T @ colors_N3)
    return plane


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
