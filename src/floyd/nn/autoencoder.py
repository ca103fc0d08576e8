"""Layers of a convolutional autoencoder: residual blocks without time, attention over pixels, resampling.

B images  C channels  H height  W width  L pixels (H * W)  O output channels

Attribute names are those of the published checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from floyd.nn.attention import fitting
from floyd.nn.norm import normed

EPS = 1e-6

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "mish": F.mish,
}


class PlainResnetBlock(nn.Module):
    """Two convolutions beside a shortcut: a residual block that knows no time."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, act_fn: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act_fn]
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BOHW = self.conv1(normed(self.norm1, x_BCHW, self.act))
        h_BOHW = self.conv2(normed(self.norm2, h_BOHW, self.act))
        return h_BOHW + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))


class PixelAttention(nn.Module):
    """Every pixel looks at every pixel, with one head as wide as the picture has channels.

    The weights of 65,536 pixels against each other (17 GB in float32) are never held at once.
    """

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_B1LC = normed(self.group_norm, x_BCHW).flatten(2).transpose(1, 2).unsqueeze(1)
        seen_B1LC = fitting(self.to_q(x_B1LC), self.to_k(x_B1LC), self.to_v(x_B1LC))
        return x_BCHW + self.to_out[0](seen_B1LC).squeeze(1).transpose(1, 2).reshape(x_BCHW.shape)


class HalvingConv(nn.Module):
    """Half the height and width; the padding lies on the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class DoublingConv(nn.Module):
    """Twice the height and width: every pixel repeated, then smoothed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class DownEncoderBlock(nn.Module):
    """One level of an encoder: residual blocks, then (but on the last level) half the size."""

    def __init__(
        self, in_channels: int, out_channels: int, *, num_layers: int, halves: bool, groups: int, act_fn: str
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers=num_layers, groups=groups, act_fn=act_fn)
        self.downsamplers = nn.ModuleList([HalvingConv(out_channels)] if halves else [])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x_BCHW = layer(x_BCHW)
        return x_BCHW


class UpDecoderBlock(nn.Module):
    """One level of a decoder: residual blocks, then (but on the last level) twice the size."""

    def __init__(
        self, in_channels: int, out_channels: int, *, num_layers: int, doubles: bool, groups: int, act_fn: str
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers=num_layers, groups=groups, act_fn=act_fn)
        self.upsamplers = nn.ModuleList([DoublingConv(out_channels)] if doubles else [])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x_BCHW = layer(x_BCHW)
        return x_BCHW


class MiddleBlock(nn.Module):
    """The narrowest place: residual block, attention over all pixels if wanted, residual block."""

    def __init__(self, channels: int, *, attends: bool, groups: int, act_fn: str) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, num_layers=2, groups=groups, act_fn=act_fn)
        self.attentions = nn.ModuleList([PixelAttention(channels, groups=groups)] if attends else [])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first, second = self.resnets
        for layer in (first, *self.attentions, second):
            x_BCHW = layer(x_BCHW)
        return x_BCHW


def _resnets(in_channels: int, out_channels: int, *, num_layers: int, groups: int, act_fn: str) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * num_layers
    pairs = itertools.pairwise(widths)
    return nn.ModuleList([PlainResnetBlock(a, b, groups=groups, act_fn=act_fn) for a, b in pairs])
