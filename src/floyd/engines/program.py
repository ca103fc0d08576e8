"""A UNet's step as a list of operations on buffers, written once for each shape of the input.

B images  C channels  H height  W width  L text tokens
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.engines.native import ACTS, KINDS, Kernels, Op
from floyd.engines.weights import Segments, Weights, padded, width
from floyd.errors import EngineError

_FEW_TILES = 12

_ACTS: dict[type[nn.Module], str] = {nn.SiLU: "silu", nn.GELU: "gelu", nn.Mish: "mish", nn.ReLU: "relu"}


@dataclass(eq=False)
class Map:
    """A feature map [B, H, W, channels] in a buffer, which is free again once it was used as often as announced."""

    buffer: Tensor
    segments: Segments
    height: int
    width: int
    num_uses: int = 1

    @property
    def channels(self) -> int:
        return width(self.segments)

    def keep(self) -> Map:
        """One more use is to come."""
        self.num_uses += 1
        return self


@dataclass(frozen=True, eq=False)
class Film:
    """Where the time's influence on one layer lies in the rows of `Program.film_BF`."""

    scale: int | None
    shift: int


class Program:
    """Operations in order. Methods append one and return the map that it writes; they use up what they read."""

    def __init__(self, kernels: Kernels, weights: Weights, batch: int, film_width: int) -> None:
        self.kernels, self.weights, self.batch = kernels, weights, batch
        self.film_BF = torch.zeros(batch, max(film_width, 1))
        self.looks: list[tuple[Op, int]] = []  # operations that read a text, and which layer's it is
        self._ops: list[Op] = []
        self._free: list[Tensor] = []
        self._held: list[Tensor] = []  # what operations point to must live
        self._work: dict[int, Tensor] = {}

    # --------------------------------------------------------------------------------------------------------- running

    def finish(self) -> None:
        self.ops = (Op * len(self._ops))(*self._ops)
        self.looks = [(self.ops[self._ops.index(op)], layer) for op, layer in self.looks]
        self._free.clear()

    def run(self, x_BCHW: Tensor, out_BCHW: Tensor, seconds: ctypes.Array[ctypes.c_double] | None = None) -> None:
        threads = torch.get_num_threads() if self.kernels.has_threads else 1
        if threads not in self._work:
            floats = max(self.kernels.work_floats(op, threads) for op in self._ops)
            self._work[threads] = torch.empty(floats)
        self.ops[0].x, self.ops[len(self.ops) - 1].out = x_BCHW.data_ptr(), out_BCHW.data_ptr()
        self.kernels.run(self.ops, self._work[threads].data_ptr(), threads, seconds)

    # ------------------------------------------------------------------------------------------------------ operations

    def read(self, channels: int, height: int, wide: int) -> Map:
        """The picture that `run` is given."""
        out = self._map((channels,), height, wide)
        self._add("from_nchw", out, channels=channels, out_channels=out.channels)
        return out

    def write(self, x: Map) -> None:
        """The picture that `run` returns."""
        op = Op(kind=KINDS.index("to_nchw"), x=x.buffer.data_ptr(), batch=self.batch, height=x.height, width=x.width)
        op.channels, op.out_channels = x.channels, x.segments[0]
        self._ops.append(op)
        self._used(x)

    def conv(
        self,
        x: Map,
        conv: nn.Conv2d,
        *,
        size: tuple[int, int] | None = None,
        factor: float = 1.0,
        film: Film | None = None,
        add: Map | None = None,
        alpha: float = 1.0,
    ) -> Map:
        """Of x as it is, or enlarged to `size` by repeating pixels. `film` stands in for the bias; `add`, which may be
        of half the size, is added."""
        height, wide = size or (x.height, x.width)
        fields: dict[str, Any] = {"x": x.buffer, "x_height": x.height, "x_width": x.width, "channels": x.channels}
        if size is not None:
            fields |= {"rows": _nearest(x.height, height), "columns": _nearest(x.width, wide)}
            fields["is_doubled"] = (height, wide) == (2 * x.height, 2 * x.width)
        if film is None:
            fields["bias"] = self.weights.bias([conv], (conv.out_channels,), factor)
        else:
            fields |= {"bias": self.film_BF[:, film.shift :], "bias_stride": self.film_BF.stride(0)}
        if add is not None:
            fields |= {"add": add.buffer, "alpha": alpha, "add_is_halved": add.height != height}
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        assert (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros"), "a UNet makes no others"
        assert isinstance(padding, int)
        if (kernel, stride, padding) == (3, 1, 1):
            kind, fields["tile"] = "conv3", self._tile(height, wide)
            weight = self.weights.conv3(conv, x.segments, factor, fields["tile"])
        else:
            assert (add, film, factor) == (None, None, 1.0), "these are for residual blocks"
            kind, weight = "conv", self.weights.conv(conv, x.segments)
            fields |= {"kernel": kernel, "stride": stride, "padding": padding}
            height, wide = ((side + 2 * padding - kernel) // stride + 1 for side in (height, wide))
        out = self._sum(add, (conv.out_channels,), height, wide)
        self._add(kind, out, weight=weight, out_channels=out.channels, **fields)
        self._used(x, add)
        return out

    def norm(
        self,
        x: Map,
        skip: Map | None,
        norm: nn.GroupNorm,
        act: nn.Module | None = None,
        *,
        film: Film | None = None,
        pools: bool = False,
    ) -> Map:
        """Of x with the channels of `skip` behind it."""
        segments = x.segments + (() if skip is None else skip.segments)
        weight, bias = self.weights.norm(norm, segments)
        fields: dict[str, Any] = {"x": x.buffer, "x_height": x.height, "x_width": x.width, "channels": x.channels}
        if skip is not None:
            fields |= {"x2": skip.buffer, "channels2": skip.channels}
        if film is not None:
            assert film.scale is not None
            fields |= {"scale": self.film_BF[:, film.scale :], "shift": self.film_BF[:, film.shift :]}
            fields["film_stride"] = self.film_BF.stride(0)
        halved = 2 if pools else 1
        out = self._map(segments, x.height // halved, x.width // halved)
        self._add(
            "norm", out, weight=weight, bias=bias, groups=_groups(segments, norm), num_groups=norm.num_groups,
            eps=norm.eps, act=act_code(act), pools=pools, **fields,
        )  # fmt: skip
        self._used(x, skip)
        return out

    def linear(
        self,
        x: Map,
        weight: Tensor,
        bias: Tensor | None,
        segments: Segments,
        *,
        add: Map | None = None,
        alpha: float = 1.0,
    ) -> Map:
        """A matrix for every pixel."""
        out = self._sum(add, segments, x.height, x.width)
        self._add(
            "linear", out, x=x.buffer, weight=weight, bias=bias, add=None if add is None else add.buffer, alpha=alpha,
            channels=x.channels, out_channels=width(segments),
        )  # fmt: skip
        self._used(x, add)
        return out

    def pool(self, x: Map, alpha: float) -> Map:
        out = self._map(x.segments, x.height // 2, x.width // 2)
        sizes = {"x_height": x.height, "x_width": x.width, "channels": x.channels}
        self._add("pool", out, x=x.buffer, alpha=alpha, **sizes)
        self._used(x)
        return out

    def attention(self, q: Map, heads: Segments, *, text: int | None, num_tokens: int, looks_at_pixels: bool) -> Map:
        """`q` is [q] or, where the pixels are looked at, [q, k, v]; `text`: which layer's keys stand before theirs."""
        out = self._map(heads, q.height, q.width)
        op = self._add(
            "attention", out, x=q.buffer, heads=len(heads), head_width=padded(heads[0]), factor=heads[0] ** -0.5,
            text=0 if text is None else num_tokens, looks_at_pixels=looks_at_pixels,
        )  # fmt: skip
        if text is not None:
            self.looks.append((op, text))
        self._used(q)
        return out

    def layer_norm(self, x: Map, norm: nn.LayerNorm) -> Map:
        weight, bias = self.weights.norm(norm, x.segments)
        out = self._map(x.segments, x.height, x.width)
        sizes = {"channels": x.channels, "out_channels": x.segments[0]}
        self._add("layer_norm", out, x=x.buffer, weight=weight, bias=bias, eps=norm.eps, **sizes)
        self._used(x)
        return out

    def geglu(self, x: Map) -> Map:
        """Of [value, gate]."""
        out = self._map(x.segments[:1], x.height, x.width)
        self._add("geglu", out, x=x.buffer, out_channels=out.channels)
        self._used(x)
        return out

    # --------------------------------------------------------------------------------------------------------- buffers

    def _map(self, segments: Segments, height: int, wide: int) -> Map:
        floats = self.batch * height * wide * width(segments)
        fitting = [buffer for buffer in self._free if floats <= buffer.numel() <= 2 * floats]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._free = [other for other in self._free if other is not buffer]
        else:
            buffer = torch.empty(floats)
            self._held.append(buffer)
        return Map(buffer, segments, height, wide)

    def _tile(self, height: int, wide: int) -> int:
        """Large tiles save products; few of them wait for the weights, of which small ones have fewer."""
        return 2 if self.batch * -(-height // 4) * -(-wide // 4) <= _FEW_TILES else 4

    def _sum(self, add: Map | None, segments: Segments, height: int, wide: int) -> Map:
        """For what something is added to: in the place of that, if nobody else needs it."""
        if add is not None and add.num_uses == 1 and (add.height, add.width, add.segments) == (height, wide, segments):
            return add.keep()
        return self._map(segments, height, wide)

    def _used(self, *maps: Map | None) -> None:
        for x in maps:
            if x is None:
                continue
            x.num_uses -= 1
            if x.num_uses == 0:
                self._free.append(x.buffer)

    def _add(self, kind: str, out: Map, **fields: Any) -> Op:
        op = Op(kind=KINDS.index(kind), out=out.buffer.data_ptr(), batch=self.batch, height=out.height, width=out.width)
        op.alpha = 1.0
        for name, value in fields.items():
            if isinstance(value, Tensor):
                self._held.append(value)
                value = value.data_ptr()
            setattr(op, name, value)
        self._ops.append(op)
        return op


def act_code(act: nn.Module | None) -> int:
    if act is None:
        return ACTS.index("none")
    if type(act) not in _ACTS or getattr(act, "approximate", "none") != "none":
        raise EngineError(f"The engine knows the activations {', '.join(ACTS[1:])}, not {act}. Use no engine.")
    return ACTS.index(_ACTS[type(act)])


def _groups(segments: Segments, norm: nn.GroupNorm) -> Tensor:
    """The group of each channel, -1 for padding."""
    size, parts, start = norm.num_channels // norm.num_groups, [], 0
    for channels in segments:
        own = torch.arange(start, start + channels) // size
        parts.append(F.pad(own, (0, padded(channels) - channels), value=-1))
        start += channels
    return torch.cat(parts).to(torch.int32)


def _nearest(source: int, target: int) -> Tensor:
    """Which pixel of a row `F.interpolate` repeats."""
    row = F.interpolate(torch.arange(source, dtype=torch.float32)[None, None], size=target, mode="nearest")
    return row[0, 0].to(torch.int32)
