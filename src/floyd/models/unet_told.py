"""What the layers of a UNet are told at one step: prompt and noise level, read once, and the time.

B images  C channels  H height  W width  L text tokens  T time width  R rows of a timetable  S all that time says
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from floyd.nn.attention import AddedKVAttention, TextKV
from floyd.nn.convolution import Convolutions
from floyd.nn.ready import ReadyResnet, ReadyUpsample
from floyd.nn.resnet import Downsample, ResnetBlock, Upsample
from floyd.nn.rewrites import Joined, Rewrites, is_watched, version_of

MOST_TABLE_BYTES = 64 << 20  # what a timetable holds at once


@dataclass(frozen=True, eq=False)
class Ready:
    """A network's layers rewritten for many steps, in the order of the forward pass.

    Belongs to the weights as they were when it was made.
    """

    resnets: tuple[ReadyResnet, ...]
    convolutions: tuple[Any, ...]  # the first, those that resample between levels, the last
    projections: tuple[Joined | None, ...]  # of each attention layer
    channels_last: bool
    weights: tuple[Tensor, ...]
    versions: list[int]

    @classmethod
    @torch.no_grad()
    def of(cls, network: nn.Module, layers: Iterable[nn.Module], rewrites: Rewrites) -> Ready | None:
        """None for a network that is watched anywhere: whoever watches is to see it compute as it always does."""
        if any(is_watched(module) for module in network.modules()):
            return None
        make, weights = Convolutions(rewrites), tuple(network.parameters())
        resnets: list[ReadyResnet] = []
        convolutions: list[Any] = []
        projections: list[Joined | None] = []
        for layer in layers:
            if isinstance(layer, ResnetBlock):
                resnets.append(ReadyResnet(layer, make))
            elif isinstance(layer, Upsample):
                convolutions.append(ReadyUpsample(layer, make))
            elif isinstance(layer, Downsample):
                convolutions.append(make.ready(layer.conv))
            elif isinstance(layer, nn.Conv2d):
                convolutions.append(make.ready(layer))
            elif isinstance(layer, AddedKVAttention) and rewrites.fuse_qkv:
                projections.append(layer.joined())
            else:
                projections.append(None)
        return cls(
            tuple(resnets),
            tuple(convolutions),
            tuple(projections),
            rewrites.channels_last,
            weights,
            [version_of(weight) for weight in weights],
        )

    @property
    def is_current(self) -> bool:
        """Whether no weight was written to since."""
        return [version_of(weight) for weight in self.weights] == self.versions

    def says(self, emb_RBT: Tensor) -> Tensor:
        """[R, B, S]: the embedding, and behind it what it says to each residual block."""
        return torch.cat([emb_RBT, *(block.says(emb_RBT) for block in self.resnets)], dim=-1)


class Timetable:
    """What time says at every step of a run: all at once, or as many steps at once as the memory allows."""

    def __init__(self, timesteps: Iterable[int], says: Callable[[Sequence[int]], Tensor]) -> None:
        self.timesteps = tuple(dict.fromkeys(timesteps))
        self.says = says
        self.rows: dict[int, Tensor] = {}
        self.num_rows = 0  # at once; not known before the first

    def row(self, t: int) -> Tensor:
        """[B, S] at a timestep, of those promised or another."""
        if t not in self.rows:
            first = self.timesteps.index(t) if t in self.timesteps else None
            wanted = (t,) if first is None else self.timesteps[first : first + max(self.num_rows, 1)]
            self.rows = dict(zip(wanted, self.says(wanted), strict=True))
            if self.num_rows == 0:
                self.num_rows = max(1, MOST_TABLE_BYTES // self.rows[t].nbytes)
        return self.rows[t]


@dataclass(frozen=True, eq=False)
class Context:
    """What the UNet is told that stays the same at every step: prompt and noise level, already read by every layer."""

    emb_BT: Tensor | None  # pooled text + label, to be added to the embedding of time
    layers: tuple[TextKV | tuple[TextKV, ...], ...]  # one entry per attention layer, in the order of the forward pass
    bias_B11L: Tensor | None = None  # 0 where a text token counts, -10000 where it does not
    ready: Ready | None = None
    table: Timetable | None = None

    @property
    def is_current(self) -> bool:
        return self.ready is None or self.ready.is_current


class Told:
    """Hands every layer what it is told, in the order of the forward pass."""

    def __init__(self, context: Context, time_BS: Tensor, time_width: int) -> None:
        ready = None if torch.is_grad_enabled() else context.ready  # copies of weights learn nothing
        self.emb_BT = time_BS[:, :time_width]
        self._time_BS, self._column = time_BS, time_width
        self._bias = context.bias_B11L
        self._texts = iter(context.layers)
        self._resnets = iter(() if ready is None else ready.resnets)
        self._convolutions = iter(() if ready is None else ready.convolutions)

    def resnet(self, block: nn.Module, x_BCHW: Tensor) -> Tensor:
        ready = next(self._resnets, None)
        if ready is None:
            return block(x_BCHW, self.emb_BT)
        begin = self._column
        self._column += ready.width
        return ready(x_BCHW, self._time_BS[:, begin : self._column])

    def attention(self, layer: nn.Module, x_BCHW: Tensor) -> Tensor:
        return layer(x_BCHW, next(self._texts), self._bias)

    def convolution(self, layer: nn.Module, x_BCHW: Tensor, *size: tuple[int, int]) -> Tensor:
        return next(self._convolutions, layer)(x_BCHW, *size)
