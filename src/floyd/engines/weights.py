"""A network's weights as the kernels read them: packed when first used, and again whenever they have changed.

K channels that are read  N channels that are written

A row of channels is split into segments (one for each tensor that stands in it, or for each head), and every segment is
padded to a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from floyd.engines.native import Kernels
from floyd.errors import EngineError

Segments = tuple[int, ...]

GRAIN = 16
_PROBES = 16  # numbers looked at in each tensor, for writes that torch does not count


def padded(channels: int) -> int:
    return -(-channels // GRAIN) * GRAIN


def width(segments: Segments) -> int:
    """Of a row, padding included."""
    return sum(padded(channels) for channels in segments)


def places(segments: Segments) -> Tensor:
    """Where in a row each of the channels lies."""
    parts, start = [], 0
    for channels in segments:
        parts.append(torch.arange(start, start + channels))
        start += padded(channels)
    return torch.cat(parts)


def spread(x: Tensor, segments: Segments) -> Tensor:
    """Channels, in the last axis, put where they lie; zero between them."""
    out = x.new_zeros(*x.shape[:-1], width(segments))
    out[..., places(segments)] = x
    return out


def panels(weight_KN: Tensor, lanes: int) -> Tensor:
    """Two vectors' width of columns after the other, the last panel one vector wide if that is enough."""
    columns = weight_KN.shape[1]
    whole = columns // (2 * lanes) * 2 * lanes
    parts = [weight_KN[:, :whole].unflatten(1, (-1, 2 * lanes)).transpose(0, 1).reshape(-1)] if whole else []
    if whole < columns:
        parts.append(weight_KN[:, whole:].reshape(-1))
    return torch.cat(parts)


@dataclass(eq=False)
class _Packed:
    """What was made of some tensors, and what these were then."""

    sources: Callable[[], tuple[Tensor, ...]]
    fill: Callable[[Tensor], object]
    tensor: Tensor
    seen: tuple[tuple[int, int], ...] = ()
    probed: tuple[float, ...] = ()


@dataclass(eq=False)
class Weights:
    """Everything packed for one network. A tensor handed out keeps its address when it is packed anew."""

    kernels: Kernels
    _packed: dict[tuple[object, ...], _Packed] = field(default_factory=dict)
    _watched: tuple[Tensor, ...] = ()
    _seen: list[int] = field(default_factory=list)

    def follow(self) -> None:
        """Pack anew what was written to since, as far as torch counts writes. Costs next to nothing."""
        if self._seen != counts(self._watched):
            self.refresh()

    @torch.no_grad()
    def refresh(self, *, probing: bool = False) -> None:
        """Pack anew what was changed since: other tensors in the place of these, too. torch does not count writes
        through `.data`: `probing` looks at some of the numbers."""
        for packed in self._packed.values():
            if _has_changed(packed, probing=probing):
                packed.tensor.zero_()
                self._fill(packed)
        self._watch()

    def _watch(self) -> None:
        tensors = {id(tensor): tensor for packed in self._packed.values() for tensor in packed.sources()}
        self._watched = tuple(tensors.values())
        self._seen = counts(self._watched)

    def num_bytes(self) -> int:
        return sum(packed.tensor.nbytes for packed in self._packed.values())

    def conv3(self, conv: nn.Conv2d, segments: Segments, factor: float, tile: int) -> Tensor:
        """A 3 x 3 kernel, transformed for tiles of 2 x 2 or 4 x 4 pixels."""
        rows, columns = width(segments), padded(conv.out_channels)
        place_K = places(segments).to(torch.int32)

        def fill(tensor: Tensor) -> None:
            self.kernels.pack_conv3(
                conv.weight.detach(), tensor, tile=tile, channels=rows, out_channels=columns, place_K=place_K,
                factor=factor, threads=torch.get_num_threads(),
            )  # fmt: skip

        return self._kept(
            ("conv3", conv, segments, factor, tile), lambda: (conv.weight,), (tile + 2) ** 2 * rows * columns, fill
        )

    def conv(self, conv: nn.Conv2d, segments: Segments) -> Tensor:
        """A kernel of any size, as a matrix with a row for each tap and channel."""
        taps, rows, columns = conv.kernel_size[0] * conv.kernel_size[1], width(segments), padded(conv.out_channels)

        def fill(tensor: Tensor) -> None:
            weight_TKN = spread(conv.weight.flatten(2).permute(2, 0, 1), segments).transpose(1, 2)
            matrix = spread(weight_TKN, (conv.out_channels,)).flatten(0, 1)
            tensor.copy_(panels(matrix, self.kernels.lanes))

        return self._kept(("conv", conv, segments), lambda: (conv.weight,), taps * rows * columns, fill)

    def linear(
        self,
        layers: Sequence[nn.Linear | nn.Conv2d],
        rows: Segments,
        columns: Segments,
        factor: float = 1.0,
        *,
        part: slice = slice(None),
    ) -> Tensor:
        """Layers that read the same as one matrix. `columns` are those of each; `part` of what they read is enough."""

        def fill(tensor: Tensor) -> None:
            made = []
            for layer in layers:
                weight_KN = spread(layer.weight.flatten(1)[:, part], rows).T * factor
                made.append(spread(weight_KN, columns))
            tensor.copy_(panels(torch.cat(made, dim=1), self.kernels.lanes))

        size = width(rows) * width(columns) * len(layers)
        key = ("linear", *layers, rows, columns, part.start, factor)
        return self._kept(key, lambda: tuple(layer.weight for layer in layers), size, fill)

    def bias(self, layers: Sequence[nn.Linear | nn.Conv2d], segments: Segments, factor: float = 1.0) -> Tensor:
        """Zeros where a layer has none."""

        def fill(tensor: Tensor) -> None:
            own = [layer.bias if layer.bias is not None else layer.weight.new_zeros(sum(segments)) for layer in layers]
            tensor.copy_(torch.cat([spread(bias * factor, segments) for bias in own]))

        def sources() -> tuple[Tensor, ...]:
            return tuple(layer.bias for layer in layers if layer.bias is not None)

        return self._kept(("bias", *layers, segments, factor), sources, width(segments) * len(layers), fill)

    def norm(self, norm: nn.GroupNorm | nn.LayerNorm, segments: Segments) -> tuple[Tensor, Tensor]:
        """Weight and bias."""

        def fill_with(name: str) -> Callable[[Tensor], object]:
            return lambda tensor: tensor.copy_(spread(getattr(norm, name), segments))

        def source_of(name: str) -> Callable[[], tuple[Tensor, ...]]:
            return lambda: (getattr(norm, name),)

        made = [
            self._kept((name, norm, segments), source_of(name), width(segments), fill_with(name))
            for name in ("weight", "bias")
        ]
        return made[0], made[1]

    def made(
        self, key: tuple[object, ...], sources: Callable[[], tuple[Tensor, ...]], size: int, make: Callable[[], Tensor]
    ) -> Tensor:
        """Anything else that is computed of weights."""
        return self._kept(key, sources, size, lambda tensor: tensor.copy_(make().reshape(-1)))

    @torch.no_grad()
    def _kept(
        self,
        key: tuple[object, ...],
        sources: Callable[[], tuple[Tensor, ...]],
        size: int,
        fill: Callable[[Tensor], object],
    ) -> Tensor:
        if key not in self._packed:
            packed = _Packed(sources, fill, torch.zeros(size))
            self._fill(packed)
            self._packed[key] = packed
            self._watched += packed.sources()
            self._seen = counts(self._watched)
        return self._packed[key].tensor

    def _fill(self, packed: _Packed) -> None:
        sources = packed.sources()
        for tensor in sources:
            check_tensor(tensor)
        packed.fill(packed.tensor)
        packed.seen, packed.probed = _seen(sources), probed(sources)


def check_tensor(tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise EngineError(
            "Engines compute from plain weights in float32 on the CPU; the network has a "
            f"{type(tensor).__name__} in {tensor.dtype} on {tensor.device}. Load it unquantized with "
            "torch_dtype=torch.float32, or use no engine."
        )


def _has_changed(packed: _Packed, *, probing: bool) -> bool:
    sources = packed.sources()
    return packed.seen != _seen(sources) or (probing and packed.probed != probed(sources))


def _seen(sources: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((tensor.data_ptr(), _count(tensor)) for tensor in sources)


def counts(tensors: tuple[Tensor, ...]) -> list[int]:
    return [_count(tensor) for tensor in tensors]


def _count(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
def probed(sources: tuple[Tensor, ...]) -> tuple[float, ...]:
    return tuple(float(t.reshape(-1)[:: max(1, t.numel() // _PROBES)].sum()) if t.numel() else 0.0 for t in sources)
