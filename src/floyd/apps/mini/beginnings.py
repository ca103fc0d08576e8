"""Where the autoencoder starts: as the picture shrunk and enlarged again, so that colours are right before it learns.

Colours travel beside all residual branches, as themselves and negated: silu(x) - silu(-x) is x.

A norm over all channels and pixels makes every colour depend on the whole picture: large areas drift, and what was
learned on windows does not hold for wholes. So one channel holds a large constant, the anchor: that norm's mean and
scale are then nearly constant, its weights undo them, and training does not move it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from floyd.models.vae import AutoencoderKL
from floyd.nn.autoencoder import DoublingConv, HalvingConv, PlainResnetBlock

COLORS = 3
ANCHOR = 2 * COLORS  # the channel after the colours and the negated ones
SCALE = 5.0  # standard deviation that the anchor makes, in those of colours: the larger, the less the rest counts
_MEAN_OF_FOUR = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]) / 4
_BILINEAR = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16  # after every pixel is repeated


@torch.no_grad()
def begin_as_resizing(vae: AutoencoderKL) -> None:
    """Set the weights so that encoding takes the mean of each square of pixels, and decoding enlarges smoothly.

    For norms of one group, more than `ANCHOR` channels everywhere, and at least `COLORS` + 1 latent ones: the first
    are the colours, the next keeps its random weights for what resizing loses, the others are zero.
    """
    for module in vae.modules():
        if isinstance(module, PlainResnetBlock):
            _pass_by(module)
        elif isinstance(module, HalvingConv):
            _carry(module.conv, _MEAN_OF_FOUR)
        elif isinstance(module, DoublingConv):
            _carry(module.conv, _BILINEAR)
    for ends in (vae.encoder, vae.decoder):
        _split(ends.conv_in)
        _undo(ends.conv_norm_out)
        _join(ends.conv_out)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        assert isinstance(conv, nn.Conv2d)
        nn.init.dirac_(conv.weight)
        _zero_bias(conv)


def _pass_by(block: PlainResnetBlock) -> None:
    """The residual branch begins as nothing, and never moves the anchor."""
    _undo(block.norm1)
    _set_anchor(block.conv1)
    _undo(block.norm2)
    nn.init.zeros_(block.conv2.weight)
    _zero_bias(block.conv2)
    _set_anchor(block.conv2, 0.0)
    if block.conv_shortcut is not None:
        _carry(block.conv_shortcut, torch.ones(1, 1))


def _carry(conv: nn.Conv2d, kernel: Tensor) -> None:
    """Colours and negated colours pass through the kernel, and nothing else is added to them."""
    _zero_bias(conv)
    for channel in range(ANCHOR):
        conv.weight[channel] = 0
        conv.weight[channel, channel] = kernel
    _set_anchor(conv)


def _split(conv: nn.Conv2d) -> None:
    _zero_bias(conv)
    for channel in range(COLORS):
        for row, sign in ((channel, 1), (COLORS + channel, -1)):
            conv.weight[row] = 0
            _center(conv)[row, channel] = sign
    _fix(conv.weight, ANCHOR, 0.0)
    _fix(conv.bias, ANCHOR, _anchor(conv))


def _join(conv: nn.Conv2d) -> None:
    _zero_bias(conv)
    for channel in range(COLORS):
        conv.weight[channel] = 0
        _center(conv)[channel, channel], _center(conv)[channel, COLORS + channel] = 1, -1
    conv.weight[COLORS + 1 :] = 0
    _fix(conv.weight, (slice(None), ANCHOR), 0.0)


def _undo(norm: nn.GroupNorm) -> None:
    """Weights that give back what came in, but for the anchor."""
    nn.init.constant_(norm.weight, SCALE)
    nn.init.constant_(norm.bias, SCALE / math.sqrt(norm.num_channels - 1))
    _fix(norm.weight, ANCHOR, 0.0)
    _fix(norm.bias, ANCHOR, 0.0)


def _set_anchor(conv: nn.Conv2d, value: float | None = None) -> None:
    """The anchor of what goes out is constant, and that of what comes in is not looked at."""
    _fix(conv.weight, ANCHOR, 0.0)
    _fix(conv.weight, (slice(None), ANCHOR), 0.0)
    _fix(conv.bias, ANCHOR, _anchor(conv) if value is None else value)


def _anchor(conv: nn.Conv2d) -> float:
    """The value that, alone among the channels that go out, has the standard deviation SCALE."""
    return SCALE * conv.out_channels / math.sqrt(conv.out_channels - 1)


def _fix(parameter: Any, index: Any, value: float) -> None:
    """Set a part of a parameter, and keep training from changing it: its gradient is zero."""
    parameter[index] = value
    parameter.register_hook(partial(_without, index=index))


def _without(gradient: Tensor, *, index: Any) -> Tensor:
    gradient = gradient.clone()
    gradient[index] = 0
    return gradient


def _center(conv: nn.Conv2d) -> Tensor:
    """The weights of a kernel's middle, to be written to."""
    height, width = conv.kernel_size
    return conv.weight[:, :, height // 2, width // 2]


def _zero_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
