"""Keeping the predicted clean picture within the range that pictures have.

B images   C channels   H height   W width   N numbers in one image
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from floyd.diffusion.schedule import at_least_float32


class Limit(Protocol):
    def __call__(self, clean_BCHW: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Clip:
    """Cut off what lies outside [-range, range]."""

    range: float = 1.0

    def __post_init__(self) -> None:
        if not self.range > 0:
            raise ValueError(f"The range of a clip must be positive, got {self.range}.")

    def __call__(self, clean_BCHW: Tensor) -> Tensor:
        return clean_BCHW.clamp(-self.range, self.range)


@dataclass(frozen=True)
class DynamicThreshold:
    """Pull saturated pixels inwards: Imagen (arXiv:2205.11487), section 2.3.

    Each image is clipped at the given quantile of its own magnitudes, though at 1 at the least and `max` at the most,
    and scaled back to [-1, 1]. Strong guidance saturates pictures; this keeps their detail.
    """

    ratio: float = 0.995
    max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"The ratio of a dynamic threshold must be in [0, 1], got {self.ratio}.")
        if not self.max > 0:
            raise ValueError(f"The max of a dynamic threshold must be positive, got {self.max}.")

    def __call__(self, clean_BCHW: Tensor) -> Tensor:
        if self.max <= 1:
            return clean_BCHW.clamp(-self.max, self.max) / self.max
        flat_BN = clean_BCHW.flatten(1)
        limit_B1 = quantile(flat_BN.abs(), self.ratio).clamp(min=1, max=self.max)
        return (flat_BN.clamp(-limit_B1, limit_B1) / limit_B1).view_as(clean_BCHW)


def quantile(x_BN: Tensor, ratio: float) -> Tensor:
    """`torch.quantile` of each row as [B, 1], without sorting the row, of any length, and finite where `x` is not.

    Equal to the last bit on finite input: the rank is a float32, as there. No number travels between devices.
    """
    x_BN = at_least_float32(x_BN)
    last = x_BN.shape[1] - 1
    rank = torch.tensor(ratio, dtype=x_BN.dtype) * last
    below = min(int(rank), last)
    above = min(int(rank.ceil()), last)
    largest = torch.finfo(x_BN.dtype).max

    upper_BN = x_BN.topk(last + 1 - below, dim=1, sorted=False).values
    ends_B2 = upper_BN.topk(1 + above - below, dim=1, largest=False).values.clamp(-largest, largest)
    return torch.lerp(ends_B2[:, :1], ends_B2[:, -1:], float(rank - below))
