"""Residual blocks, made ready for many steps with the same weights: see rewrites.

B images  C channels  H height  W width  D width of the time embedding  R rows of a timetable  S what time says
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.nn.convolution import Convolutions
from floyd.nn.resnet import ResnetBlock, Upsample
from floyd.nn.rewrites import elementwise, is_exactly


class ReadyResnet:
    """What a `ResnetBlock` computes, from a row of the timetable instead of an embedding."""

    def __init__(self, block: ResnetBlock, convolutions: Convolutions) -> None:
        self.block = block
        self.folds = convolutions.rewrites.fold_scale_shift and block.is_film and is_exactly(block.norm2, nn.GroupNorm)
        self.width = block.norm2.num_channels * (2 if block.is_film else 1)
        self.conv1 = convolutions.doubling(block.conv1) if block.resample == "up" else convolutions.ready(block.conv1)
        self.conv2 = convolutions.ready(block.conv2)
        self.conv_shortcut = convolutions.ready(block.conv_shortcut)

    def says(self, emb_RBD: Tensor) -> Tensor:
        """[R, B, S]: what time says, at many times at once."""
        time_RBS = self.block.projected(emb_RBD)
        if not self.folds:
            return time_RBS
        norm = self.block.norm2
        exact = torch.promote_types(time_RBS.dtype, torch.float32)
        scale, shift = time_RBS.to(exact).chunk(2, dim=-1)
        affine = torch.cat([norm.weight * (1 + scale), norm.bias * (1 + scale) + shift], dim=-1)
        return affine.to(time_RBS.dtype)

    def __call__(self, x_BCHW: Tensor, time_BS: Tensor) -> Tensor:
        block = self.block
        h_BCHW = elementwise(block.nonlinearity, block.norm1(x_BCHW))
        if block.resample == "down":
            h_BCHW = block.resampled(h_BCHW)
        h_BCHW = elementwise(block.nonlinearity, self._timed(self.conv1(h_BCHW), time_BS))
        h_BCHW = self.conv2(block.dropout(h_BCHW))
        x_BCHW = block.resampled(x_BCHW)
        if self.conv_shortcut is not None:
            x_BCHW = self.conv_shortcut(x_BCHW)
        h_BCHW = h_BCHW.add_(x_BCHW)
        return h_BCHW if block.out_scale == 1.0 else h_BCHW.div_(block.out_scale)

    def _timed(self, h_BCHW: Tensor, time_BS: Tensor) -> Tensor:
        if not self.folds:
            return self.block.timed(h_BCHW, time_BS)
        norm, (batch, channels, *size) = self.block.norm2, h_BCHW.shape
        weight_BC, bias_BC = time_BS.chunk(2, dim=1)
        if h_BCHW.is_contiguous():  # each image's channels are groups of their own: one kernel does it all
            flat = h_BCHW.view(1, batch * channels, *size)
            flat = F.group_norm(flat, batch * norm.num_groups, weight_BC.flatten(), bias_BC.flatten(), norm.eps)
            return flat.view(h_BCHW.shape)
        h_BCHW = F.group_norm(h_BCHW, norm.num_groups, eps=norm.eps)
        return torch.addcmul(bias_BC[:, :, None, None], h_BCHW, weight_BC[:, :, None, None])


class ReadyUpsample:
    """What an `Upsample` computes; sizes that are not doubled exactly, as it computes them."""

    def __init__(self, layer: Upsample, convolutions: Convolutions) -> None:
        self.conv = layer.conv
        self.doubling = convolutions.doubling(layer.conv)

    def __call__(self, x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
        if size == (2 * x_BCHW.shape[-2], 2 * x_BCHW.shape[-1]):
            return self.doubling(x_BCHW)
        return self.conv(F.interpolate(x_BCHW, size=size, mode="nearest"))
