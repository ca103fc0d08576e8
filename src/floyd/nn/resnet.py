"""Residual convolution blocks and the resampling between levels.

B images  C channels  H height  W width  D width of the time embedding
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from floyd.nn.activation import activation
from floyd.nn.norm import normed
from floyd.nn.rewrites import Elementwise


class ResnetBlock(nn.Module):
    """norm, act, conv, time, norm, act, conv, plus the input (ADM: arXiv:2105.05233).

    `time_scale_shift` "scale_shift": time scales and shifts the second norm (FiLM); "default": time is added before it.
    `resample` "up" / "down": input and first branch are both resampled, without parameters of their own.
    `skip_time_act`: the embedding comes activated already.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_width: int,
        groups: int = 32,
        eps: float = 1e-5,
        act_fn: str = "silu",
        dropout: float = 0.0,
        time_scale_shift: str = "default",
        skip_time_act: bool = False,
        out_scale: float = 1.0,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.is_film = time_scale_shift == "scale_shift"
        self.skip_time_act = skip_time_act
        self.out_scale = out_scale
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels * (2 if self.is_film else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = activation(act_fn)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor, emb_BD: Tensor) -> Tensor:
        h_BCHW = self.conv1(self.resampled(normed(self.norm1, x_BCHW, self.nonlinearity)))
        h_BCHW = self.timed(h_BCHW, self.projected(emb_BD), self.nonlinearity)
        h_BCHW = self.conv2(self.dropout(h_BCHW))
        x_BCHW = self.resampled(x_BCHW)
        if self.conv_shortcut is not None:
            x_BCHW = self.conv_shortcut(x_BCHW)
        out_BCHW = x_BCHW + h_BCHW
        return out_BCHW if self.out_scale == 1.0 else out_BCHW / self.out_scale

    def projected(self, emb_BD: Tensor) -> Tensor:
        """What time says to this block: scale and shift, or what to add."""
        return self.time_emb_proj(emb_BD if self.skip_time_act else self.nonlinearity(emb_BD))

    def timed(self, h_BCHW: Tensor, time_BC: Tensor, act: Elementwise | None = None) -> Tensor:
        """The second norm, told the time."""
        if not self.is_film:
            return normed(self.norm2, h_BCHW + time_BC[:, :, None, None], act)
        scale_BC, shift_BC = time_BC.chunk(2, dim=1)
        return normed(self.norm2, h_BCHW, act, (scale_BC, shift_BC))

    def resampled(self, x_BCHW: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        if self.resample == "down":
            return F.avg_pool2d(x_BCHW, kernel_size=2, stride=2)
        return x_BCHW


class Downsample(nn.Module):
    """Halve the sides with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(x_BCHW)


class Upsample(nn.Module):
    """Enlarge to the size of the skip that waits, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, size=size, mode="nearest"))
