"""Masks of every kind to what a canvas keeps and repaints.

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from floyd.images.convert import UNIT, check_range, joined
from floyd.images.modes import to_gray, upright

Mask = Image.Image | np.ndarray | Tensor


def mask_to_tensor(
    masks: Mask | Sequence[Mask],
    *,
    resize: Callable[[Image.Image], Image.Image] | None = None,
    name: str = "mask_image",
) -> Tensor:
    """One float32 batch [B, 1, H, W] of 1 (repaint: white, at least half) and 0 (keep: black).

    PIL pictures of any mode pass through `resize`. Arrays are [H, W], [B, H, W] or [B, H, W, 1], tensors [H, W],
    [B, H, W] or [B, 1, H, W]; they hold booleans, floats in [0, 1] or uint8 in 0..255.
    """
    items: Sequence[Mask] = masks if isinstance(masks, Sequence) else [masks]
    return joined([_batch(item, resize, name) for item in items], name=name)


def _batch(item: Mask, resize: Callable[[Image.Image], Image.Image] | None, name: str) -> Tensor:
    if isinstance(item, Image.Image):
        gray = to_gray(upright(item))
        return _split(torch.from_numpy(np.array(gray if resize is None else resize(gray)) / 255.0)[None, None])
    if isinstance(item, np.ndarray):
        item = torch.from_numpy(np.moveaxis(item, -1, -3).copy() if item.ndim == 4 else item.copy())
    elif not isinstance(item, Tensor):
        raise TypeError(f"{name} must be PIL pictures, numpy arrays or tensors, got {type(item).__name__}.")
    if item.ndim not in (2, 3, 4) or (item.ndim == 4 and item.shape[1] != 1):
        raise ValueError(f"{name} must be [H, W], [B, H, W] or one channel in four axes, got {list(item.shape)}.")
    mask_BHW = item if item.ndim != 4 else item[:, 0]
    return _split(_unit(mask_BHW, name).reshape(-1, 1, *item.shape[-2:]))


def _unit(mask: Tensor, name: str) -> Tensor:
    if mask.dtype == torch.bool:
        return mask.float()
    low, high = mask.amin().item(), mask.amax().item()
    if mask.dtype == torch.uint8:
        if high == 1:
            raise ValueError(f"{name} holds uint8 of 0 and 1, but uint8 means 0..255: pass booleans or floats.")
        return mask / 255.0
    if not mask.is_floating_point():
        raise TypeError(f"{name} must hold booleans, floats or uint8, got {mask.dtype}.")
    check_range(low, high, UNIT, name=name)
    return mask


def _split(mask_B1HW: Tensor) -> Tensor:
    return (mask_B1HW >= 0.5).float()
