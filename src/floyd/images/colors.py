"""The colours of an enlarged picture, taken back from the small one that it was made of.

A super-resolution network sees the small picture through noise, and large areas drift: gradients become blotches, flat
colours another shade. What the small picture shows of them is right; only edges and texture were to be invented.

B images  C channels  H height  W width  h, w of the small picture
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SPREAD = 2.0  # pixels of the small picture: what is coarser is taken from it, what is finer from the large one


def with_colors_of(small_BChw: Tensor | None, x_BCHW: Tensor, spread: float = SPREAD) -> Tensor:
    """`x` with the coarse part of the small picture instead of its own, both in the same range; None: as it is.

    Coarse is what a Gaussian with a standard deviation of `spread` pixels of the small picture lets through: the colour
    correction of StableSR (arXiv:2305.07015, section 3.3), with one such band instead of wavelets. Every image is
    computed by itself.
    """
    if small_BChw is None:
        return x_BCHW
    pairs = zip(small_BChw.split(1), x_BCHW.split(1), strict=True)
    return torch.cat(
        [x_1CHW + _coarse_difference(small_1Chw.to(x_1CHW), x_1CHW, spread) for small_1Chw, x_1CHW in pairs]
    )


def _coarse_difference(small_1Chw: Tensor, x_1CHW: Tensor, spread: float) -> Tensor:
    """By how much the coarse parts differ, at the size of `x`."""
    rows, columns = small_1Chw.shape[-2:]
    blur_hh, blur_ww = (_gaussian(side, spread).to(x_1CHW) for side in (rows, columns))
    difference_1Chw = blur_hh @ (small_1Chw - averaged(x_1CHW, (rows, columns))) @ blur_ww.T
    return F.interpolate(difference_1Chw, x_1CHW.shape[-2:], mode="bilinear", align_corners=False)


def averaged(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The mean colours of so many rows and columns of fields, on any device."""
    is_whole = all(large % small == 0 for large, small in zip(x_BCHW.shape[-2:], size, strict=True))
    on_BCHW = x_BCHW if is_whole else x_BCHW.cpu()  # accelerators average over whole boxes alone
    return F.adaptive_avg_pool2d(on_BCHW, size).to(x_BCHW)


def _gaussian(side: int, spread: float) -> Tensor:
    """[side, side]: a blur along one axis as a product; at the border the weights that are left add up to one."""
    place = torch.arange(side, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((place[:, None] - place[None]) / spread).square())
    return weights / weights.sum(1, keepdim=True)
