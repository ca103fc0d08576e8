"""What a memory plan is made of: networks, their weights, and the work that one call gives them.

Everything here is known without loading a weight: shapes come from the heads of files or from an architecture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
MOST_PACKED_BYTES = 2 << 30  # of a network's convolutions: more are not laid out anew
_GROUP = 32  # weights that share a scale in 4 bits


def bytes_of(shape: tuple[int, ...], dtype: str, quantization: str | None = None) -> int:
    """A weight at rest. Quantized, a matrix keeps a float32 scale for each of its rows (int8) or a 16-bit one for every
    32 weights (int4); whatever has fewer than two axes stays as it is."""
    count = prod(shape)
    if quantization is None or len(shape) < 2:
        return count * ITEM_BYTES[dtype]
    if quantization == "int8":
        return count + 4 * shape[0]
    if quantization == "int4":
        rows = shape[0]
        return (count + 1) // 2 + 2 * rows * -(-count // rows // _GROUP)
    raise ValueError(f"quantization must be None, 'int8' or 'int4', got {quantization!r}.")


class Precision(NamedTuple):
    """What the weights are held in; computed with is the dtype."""

    dtype: str
    quantization: str | None = None

    def __str__(self) -> str:
        return self.dtype if self.quantization is None else f"{self.quantization} ({self.dtype})"


class Weight(NamedTuple):
    """One tensor of a checkpoint."""

    unit: str  # the layer that it belongs to: what is streamed goes layer by layer
    shape: tuple[int, ...]
    is_quantizable: bool = True
    overflows: bool = False  # in float16, so that it stays in float32 there
    copies: float = 0.0  # how much of it is there once more for as long as many steps are computed

    def num_bytes(self, precision: Precision) -> int:
        dtype, quantization = precision
        if self.overflows and dtype == "float16" and quantization is None:
            dtype = "float32"
        return bytes_of(self.shape, dtype, quantization if self.is_quantizable else None)


class Way(NamedTuple):
    """How a network's work is cut."""

    chunks: int  # passes through the weights for one step
    flops: float  # of one step, all chunks
    numbers: float  # alive at once beside the weights, whatever their precision
    rows: int | None = None  # of a batch at once; None for all of them
    tile: int | None = None  # side of a tile of latents


@dataclass(frozen=True, eq=False)
class Part:
    """A network with its work in one call."""

    name: str  # "stage_1.unet"
    weights: tuple[Weight, ...]
    precisions: tuple[Precision, ...]  # the most exact first
    passes: int  # steps
    ways: tuple[Way, ...]  # the least cut first
    stored_bytes: int = 0  # on disk
    held_bytes: int = 0  # pictures and the like, beside the network

    @property
    def group(self) -> str:
        """What is to lie on one card: the networks of a stage, and a text encoder by itself."""
        stage, _, component = self.name.rpartition(".")
        return self.name if component == "text_encoder" else stage

    def limited(self, quantizations: Container[str | None], *, tiles: bool) -> Part:
        """With the precisions of these kinds, and cut into tiles or not; what a caller has decided stays."""
        precisions = tuple(p for p in self.precisions if p.quantization in quantizations)
        ways = tuple(way for way in self.ways if tiles or way.tile is None)
        return replace(self, precisions=precisions or self.precisions, ways=ways)

    def num_bytes(self, precision: Precision) -> int:
        return self._sizes[precision].total

    def units(self, precision: Precision) -> list[int]:
        return self._sizes[precision].units

    def unpacked_bytes(self, precision: Precision) -> int:
        """Of the largest quantized weight, as it stands while it is computed with."""
        if precision.quantization is None:
            return 0
        return self._largest * ITEM_BYTES[precision.dtype]

    def copied_bytes(self, precision: Precision) -> int:
        """Of weights that are laid out anew for many steps; quantized ones are not."""
        if precision.quantization is not None:
            return 0
        packed, joined = 0.0, 0.0
        for weight in self.weights:
            size = weight.copies * weight.num_bytes(precision)
            packed, joined = (packed + size, joined) if len(weight.shape) == 4 else (packed, joined + size)
        return int(min(packed, MOST_PACKED_BYTES) + joined)

    @cached_property
    def num_weights(self) -> int:
        return sum(prod(weight.shape) for weight in self.weights)

    @cached_property
    def _largest(self) -> int:
        """Numbers of the largest weight that can be quantized."""
        return max((prod(w.shape) for w in self.weights if w.is_quantizable and len(w.shape) > 1), default=0)

    @cached_property
    def _sizes(self) -> dict[Precision, _Sizes]:
        return {precision: _Sizes.of(self.weights, precision) for precision in self.precisions}


@dataclass(frozen=True)
class _Sizes:
    total: int
    units: list[int]

    @classmethod
    def of(cls, weights: Iterable[Weight], precision: Precision) -> _Sizes:
        units: dict[str, int] = defaultdict(int)
        for weight in weights:
            units[weight.unit] += weight.num_bytes(precision)
        return cls(sum(units.values()), list(units.values()))


SLOTS = 2  # of the ring that weights are streamed through: one is computed with while the other is filled


class Ring(NamedTuple):
    """How much of a network stays on the device, and how large the slots are that the rest goes through."""

    slot_bytes: int
    resident_bytes: int  # at most


def smallest_ring(units: Iterable[int], budget_bytes: int, slots: int = SLOTS) -> Ring | None:
    """The ring with the smallest slots that the budget allows: layers that do not fit in a slot must stay. Whatever the
    slots do not take is for layers that stay, so the smallest slots leave the least to be carried. None if nothing
    fits."""
    sizes = sorted(units)
    must_stay = sum(sizes)
    if must_stay <= budget_bytes:
        return Ring(0, must_stay)
    for size in sizes:
        must_stay -= size
        # of layers of one size the last one tells; a slot smaller than that leaves its fellows without a place
        if slots * size + must_stay <= budget_bytes:
            return Ring(size, budget_bytes - slots * size)
    return None


def least_bytes(units: Iterable[int], slots: int = SLOTS) -> int:
    """The smallest budget for which there is a ring."""
    sizes = sorted(units)
    must_stay = total = sum(sizes)
    best = total
    for size in sizes:
        must_stay -= size
        best = min(best, slots * size + must_stay)
    return best
