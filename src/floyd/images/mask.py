"""Masks of every kind to what a canvas keeps and repaints.

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from floyd.images.convert import UNIT, check_not_empty, check_range, from_numpy, joined
from floyd.images.modes import to_gray, upright

Mask = Image.Image | np.ndarray | Tensor


def mask_to_tensor(
    masks: Mask | Sequence[Mask],
    *,
    resize: Callable[[Image.Image], Image.Image] | None = None,
    size: tuple[int, int] | None = None,
    shapes: Sequence[tuple[int, int]] = (),
    name: str = "mask_image",
) -> Tensor:
    """One float32 batch [B, 1, H, W] of 1 (repaint: white, at least half) and 0 (keep: black).

    PIL pictures of any mode pass through `resize`. Arrays are [H, W], [B, H, W] or [B, H, W, 1], tensors [H, W],
    [B, H, W] or [B, 1, H, W]; they hold booleans, floats in [0, 1] or uint8 in 0..255. With a `size` (height, width)
    all are brought to it, if they have its shape or one of `shapes`: the picture's before it was resized.
    """
    items: Sequence[Mask] = masks if isinstance(masks, Sequence) else [masks]
    parts = [_batch(item, resize, size, shapes, name) for item in items]
    return joined(parts, name=name)


def softened(mask_B1HW: Tensor, feather: int) -> Tensor:
    """A mask that rises from the edge of what it keeps over so many pixels of what it repaints; kept stays kept."""
    total_B1HW = narrower_B1HW = mask_B1HW
    for _ in range(feather):
        narrower_B1HW = -F.max_pool2d(-narrower_B1HW, 3, stride=1, padding=1)  # beyond the picture nothing is kept
        total_B1HW = total_B1HW + narrower_B1HW
    return total_B1HW / (feather + 1)


def _batch(
    item: Mask,
    resize: Callable[[Image.Image], Image.Image] | None,
    size: tuple[int, int] | None,
    shapes: Sequence[tuple[int, int]],
    name: str,
) -> Tensor:
    if isinstance(item, Image.Image):
        check_not_empty(item, name=name)
        gray = to_gray(upright(item))
        given_11HW = _unit(torch.from_numpy(np.array(gray)), name)[None, None]
        resized = gray if resize is None else resize(gray)
        if size is None or (resized.height, resized.width) == size:
            return _split(torch.from_numpy(np.array(resized))[None, None] / 255.0)
        return _split(_fitted(given_11HW, size, shapes, name))
    if isinstance(item, np.ndarray):
        item = from_numpy(np.moveaxis(item, -1, -3) if item.ndim == 4 else item, name=name)
    elif not isinstance(item, Tensor):
        raise TypeError(f"{name} must be PIL pictures, numpy arrays or tensors, got {type(item).__name__}.")
    if item.ndim not in (2, 3, 4) or (item.ndim == 4 and item.shape[1] != 1):
        raise ValueError(f"{name} must be [H, W], [B, H, W] or one channel in four axes, got {list(item.shape)}.")
    if not item.numel():
        raise ValueError(f"{name} is empty: its shape is {list(item.shape)}.")
    mask_BHW = (item if item.ndim != 4 else item[:, 0]).cpu()  # accelerators average over whole boxes alone
    mask_B1HW = _unit(mask_BHW, name).reshape(-1, 1, *item.shape[-2:])
    return _split(mask_B1HW if size is None else _fitted(mask_B1HW, size, shapes, name))


def _unit(mask: Tensor, name: str) -> Tensor:
    if mask.dtype == torch.bool:
        return mask.float()
    if mask.dtype == torch.uint8:
        if mask.amax().item() == 1:
            raise ValueError(f"{name} holds uint8 of 0 and 1, but uint8 means 0..255: pass booleans or floats.")
        return mask / 255.0
    if not mask.is_floating_point():
        raise TypeError(f"{name} must hold booleans, floats or uint8, got {mask.dtype}.")
    low, high = mask.float().amin().item(), mask.float().amax().item()
    check_range(low, high, UNIT, name=name)
    return mask


def _fitted(mask_B1HW: Tensor, size: tuple[int, int], shapes: Sequence[tuple[int, int]], name: str) -> Tensor:
    """Each axis by itself: what is shrunk is averaged over boxes, what is enlarged takes the nearest pixel."""
    given = (mask_B1HW.shape[2], mask_B1HW.shape[3])
    if given == size:
        return mask_B1HW
    picture = (tuple(shapes) or (size,))[0]
    if not any(_have_one_shape(given, shape) for shape in (size, *shapes)):
        raise ValueError(
            f"{name} is {given[1]}x{given[0]} px, the picture {picture[1]}x{picture[0]} px (width x height): give both "
            "the same shape; a mask may be larger or smaller than the picture, but of no other shape."
        )
    mask_B1HW = mask_B1HW.float()
    for axis, length in enumerate(size):
        target = [length if i == axis else side for i, side in enumerate(mask_B1HW.shape[2:])]
        mode = "area" if length < mask_B1HW.shape[2 + axis] else "nearest-exact"
        mask_B1HW = F.interpolate(mask_B1HW, target, mode=mode)
    return mask_B1HW


def _have_one_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether one can be the other resized: to within a pixel of rounding."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= max(*a, *b)


def _split(mask_B1HW: Tensor) -> Tensor:
    return (mask_B1HW >= 0.5).float()
