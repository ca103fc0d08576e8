"""How a weight is kept in fewer bits, and what that takes: the arithmetic alone, no layers.

int8   a byte for each weight, a float32 scale for each output channel
fp8    the same with float8_e4m3fn: a coarser step near the largest weight, a finer one near zero
int4   half a byte for each weight, a bfloat16 scale for every 32 of them, in the order in which they lie

The four bits name one of 16 values that suit a normal distribution (NF4, QLoRA, arXiv:2305.14314, appendix E).

O output channels  K weights of a channel  G groups of a channel  J bytes of a channel
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

GROUP = 32
# Weights that are worked on at once: beside the result little lies in memory, in a CPU's nearest.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**18, 2**25
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_GRID = 2047  # steps from the lowest value to the highest, of a table of the nearest values
_REFINEMENTS = 2  # of a group's scale; each makes the error a little smaller, and loading a little slower


class Extent(NamedTuple):
    """Of a tensor that need not exist."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Kept(NamedTuple):
    """What is kept of a weight."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def room(cls, extents: tuple[Extent, Extent], device: torch.device | str) -> Kept:
        return cls(*(torch.empty(extent.shape, dtype=extent.dtype, device=device) for extent in extents))


class Scheme(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def by_channel(self) -> bool:
        """Whether `codes` times one factor for each output channel is the weight."""

    @property
    def group_size(self) -> int | None: ...

    def extents(self, shape: Sequence[int]) -> tuple[Extent, Extent]:
        """Of codes and scale, for a weight of this shape."""

    def keep(self, weight: Tensor, out: Kept) -> None:
        """Write into `out` what is kept of the weight."""

    def weight(self, kept: Kept, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight again, nearly."""


@dataclass(frozen=True)
class ByChannel:
    """One scale for each output channel; the largest weight of a channel is exact."""

    name: str
    dtype: torch.dtype
    largest: float

    by_channel = True
    group_size = None

    def extents(self, shape: Sequence[int]) -> tuple[Extent, Extent]:
        return Extent(tuple(shape), self.dtype), Extent((shape[0],), torch.float32)

    def keep(self, weight: Tensor, out: Kept) -> None:
        for rows in _rows(weight):
            part = weight[rows].float()
            scale_O = part.flatten(1).abs().amax(1) / self.largest
            ratio = part / _as_rows(torch.where(scale_O > 0, scale_O, 1.0), weight.ndim)
            whole = ratio if self.dtype.is_floating_point else ratio.round_()
            out.codes[rows] = whole.clamp_(-self.largest, self.largest).to(self.dtype)
            out.scale[rows] = scale_O

    def weight(self, kept: Kept, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        out = torch.empty(tuple(shape), dtype=dtype, device=kept.codes.device)
        for rows in _rows(kept.codes, prod(shape[1:])):
            out[rows] = kept.codes[rows].float() * _as_rows(kept.scale[rows], len(shape))
        return out


@dataclass(frozen=True)
class ByGroup:
    """One scale for each 32 weights that lie beside each other in a channel."""

    name: str = "int4"

    by_channel = False
    group_size = GROUP

    def extents(self, shape: Sequence[int]) -> tuple[Extent, Extent]:
        groups = -(-prod(shape[1:]) // GROUP)
        return Extent((shape[0], groups * GROUP // 2), torch.uint8), Extent((shape[0], groups), torch.bfloat16)

    def keep(self, weight: Tensor, out: Kept) -> None:
        codes, scale = out
        weight_OK = weight.flatten(1)
        for rows in _rows(weight):
            padded = torch.nn.functional.pad(weight_OK[rows].float(), (0, 2 * codes.shape[1] - weight_OK.shape[1]))
            scale[rows], nibbles = _best(padded.unflatten(1, (-1, GROUP)))
            low, high = nibbles.flatten(1).unflatten(1, (-1, 2)).unbind(2)
            codes[rows] = low | (high << 4)

    def weight(self, kept: Kept, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        out_OK = torch.empty((shape[0], prod(shape[1:])), dtype=dtype, device=kept.codes.device)
        values = torch.tensor(_NF4, device=kept.codes.device)
        pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)  # of a byte: low, high
        for rows in _rows(kept.codes, prod(shape[1:])):
            codes_OJ, scale_OG = kept.codes[rows], kept.scale[rows]
            unit = pairs.index_select(0, codes_OJ.flatten().int()).view(*scale_OG.shape, GROUP)
            out_OK[rows] = (unit * scale_OG.float()[..., None]).flatten(1)[:, : out_OK.shape[1]]
        return out_OK.view(tuple(shape))


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (ByChannel("int8", torch.int8, 127.0), ByChannel("fp8", torch.float8_e4m3fn, 448.0), ByGroup())
}


def scheme_named(name: str) -> Scheme:
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"quantization must be one of {', '.join(SCHEMES)}, or None; got {name!r}.")
    return SCHEMES[name]


def _best(weight_OGn: Tensor) -> tuple[Tensor, Tensor]:
    """Scales, and the numbers of the nearest values. From the largest weight the scale moves to where the squared
    error is least for the values chosen, and these are chosen again."""
    values = torch.tensor(_NF4, device=weight_OGn.device)
    grid = torch.linspace(-1, 1, _GRID + 1, device=weight_OGn.device)
    codes = torch.bucketize(grid, (values[1:] + values[:-1]) / 2).to(torch.uint8)  # the nearest value of each point
    rounded = values[codes.int()]
    scale_OG1 = weight_OGn.abs().amax(2, keepdim=True)
    for _ in range(_REFINEMENTS):
        chosen = rounded.index_select(0, _points(weight_OGn, scale_OG1)).view(weight_OGn.shape)
        power = (chosen * chosen).sum(2, keepdim=True)
        scale_OG1 = torch.where(power > 0, (weight_OGn * chosen).sum(2, keepdim=True) / power, 0.0)
    scale_OG1 = scale_OG1.bfloat16()
    nearest = codes.index_select(0, _points(weight_OGn, scale_OG1.float()))
    return scale_OG1[..., 0], nearest.view(weight_OGn.shape)


def _points(weight_OGn: Tensor, scale_OG1: Tensor) -> Tensor:
    """Where weights lie on the grid, flat: a table is read five times as fast as a value is searched for."""
    half = _GRID / 2
    steps = torch.where(scale_OG1 > 0, half / scale_OG1, 0.0)
    return (weight_OGn * steps).add_(half).round_().clamp_(0, _GRID).int().flatten()


def _as_rows(factor_O: Tensor, ndim: int) -> Tensor:
    return factor_O.view(-1, *[1] * (ndim - 1))


def _rows(tensor: Tensor, width: int | None = None) -> list[slice]:
    width = max(1, prod(tensor.shape[1:]) if width is None else width)
    step = max(1, (_AT_ONCE if tensor.device.type == "cpu" else _AT_ONCE_ELSEWHERE) // width)
    return [slice(start, start + step) for start in range(0, tensor.shape[0], step)]
