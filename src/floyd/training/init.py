"""Where training starts: every residual branch adds nothing at first (ADM, arXiv:2105.05233)."""

from __future__ import annotations

from torch import nn

from floyd.models.unet import UNet2DConditionModel
from floyd.nn.attention import AddedKVAttention
from floyd.nn.resnet import ResnetBlock
from floyd.nn.transformer import Transformer2D


def zero_residuals(unet: UNet2DConditionModel) -> None:
    last_layers: list[nn.Module] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock):
            last_layers.append(module.conv2)
        elif isinstance(module, AddedKVAttention):
            last_layers.append(module.to_out[0])
        elif isinstance(module, Transformer2D):
            last_layers.append(module.proj_out)
    for layer in last_layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
