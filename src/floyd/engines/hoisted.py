"""A UNet's step with all that the prompt, the noise level and the time decide as inputs: a graph of pictures alone.

B images  C channels  F what the time says to all layers  H height  W width  T time width
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.models.unet import UNet2DConditionModel
from floyd.nn.attention import AddedKVAttention, TextKV
from floyd.nn.resnet import ResnetBlock

Texts = Iterator[TextKV | tuple[TextKV, ...]]


class Films:
    """All layers' projections of the time as one. Belongs to the weights as they were when it was made."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.resnets = list(resnets_of(unet))
        self.weight_FT = torch.cat([resnet.time_emb_proj.weight for resnet in self.resnets])
        self.bias_F = torch.cat([_film_bias(resnet) for resnet in self.resnets])
        self.sizes = [resnet.conv1.out_channels for resnet in self.resnets for _ in range(2 if resnet.is_film else 1)]
        self.is_mixed = len({(resnet.skip_time_act, type(resnet.nonlinearity)) for resnet in self.resnets}) > 1

    def of(self, emb_BT: Tensor) -> list[Tensor]:
        """Scale and shift, or what is added, [B, C, 1, 1] each, in the order of the layers."""
        if self.is_mixed:
            said = [_activated(resnet, emb_BT) @ resnet.time_emb_proj.weight.T for resnet in self.resnets]
            film_BF = torch.cat(said, dim=1) + self.bias_F
        else:
            film_BF = F.linear(_activated(self.resnets[0], emb_BT), self.weight_FT, self.bias_F)
        return [part.contiguous()[:, :, None, None] for part in film_BF.split(self.sizes, dim=1)]


def resnets_of(unet: UNet2DConditionModel) -> Iterator[ResnetBlock]:
    """In the order of the forward pass."""
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        samplers = (*getattr(block, "downsamplers", ()), *getattr(block, "upsamplers", ()))
        yield from (layer for layer in (*block.resnets, *samplers) if isinstance(layer, ResnetBlock))


def flat(texts: Texts) -> Iterator[Tensor]:
    """Keys and values in turn."""
    for text in texts:
        for own in (text,) if isinstance(text, TextKV) else text:
            yield own.key_BNLK
            yield own.value_BNLK


class Hoisted(nn.Module):
    """The network's own layers, called with x, then the films, then the texts, then the bias if there is one."""

    def __init__(self, unet: UNet2DConditionModel, *, num_films: int, has_bias: bool) -> None:
        super().__init__()
        self.unet, self.num_films, self.has_bias = unet, num_films, has_bias

    def forward(self, x_BCHW: Tensor, *told: Tensor) -> Tensor:
        unet: Any = self.unet
        films, texts = iter(told[: self.num_films]), self._texts(iter(told[self.num_films :]))
        bias = told[-1] if self.has_bias else None

        x_BCHW = unet.conv_in(x_BCHW)
        skips = [x_BCHW]
        for down in unet.down_blocks:
            for i, resnet in enumerate(down.resnets):
                x_BCHW = _residual(resnet, x_BCHW, films)
                if len(down.attentions):
                    x_BCHW = down.attentions[i](x_BCHW, next(texts), bias)
                skips.append(x_BCHW)
            for sampler in down.downsamplers:
                is_residual = isinstance(sampler, ResnetBlock)
                x_BCHW = _residual(sampler, x_BCHW, films) if is_residual else sampler(x_BCHW)
                skips.append(x_BCHW)
        first, last = unet.mid_block.resnets
        x_BCHW = unet.mid_block.attentions[0](_residual(first, x_BCHW, films), next(texts), bias)
        x_BCHW = _residual(last, x_BCHW, films)
        for up in unet.up_blocks:
            for i, resnet in enumerate(up.resnets):
                x_BCHW = _residual(resnet, torch.cat([x_BCHW, skips.pop()], dim=1), films)
                if len(up.attentions):
                    x_BCHW = up.attentions[i](x_BCHW, next(texts), bias)
            for sampler in up.upsamplers:
                if isinstance(sampler, ResnetBlock):
                    x_BCHW = _residual(sampler, x_BCHW, films)
                else:
                    x_BCHW = sampler(x_BCHW, (skips[-1].shape[-2], skips[-1].shape[-1]))
        out_BCHW: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(x_BCHW)))
        return out_BCHW

    def _texts(self, texts: Iterator[Tensor]) -> Texts:
        for layer in self.unet.attention_layers():
            if isinstance(layer, AddedKVAttention):
                yield TextKV(next(texts), next(texts))
            else:
                block: Any = layer.transformer_blocks[0]
                yield tuple(TextKV(next(texts), next(texts)) for _ in range(2 if block.only_cross_attention else 1))


def _residual(resnet: ResnetBlock, x_BCHW: Tensor, films: Iterator[Tensor]) -> Tensor:
    """A block that was told the time already."""
    h_BCHW = resnet.conv1(_resampled(resnet, resnet.nonlinearity(resnet.norm1(x_BCHW))))
    if resnet.is_film:
        scale_BC11, shift_BC11 = next(films), next(films)
        h_BCHW = resnet.norm2(h_BCHW) * scale_BC11 + shift_BC11
    else:
        h_BCHW = resnet.norm2(h_BCHW + next(films))
    h_BCHW = resnet.conv2(resnet.nonlinearity(h_BCHW))
    x_BCHW = _resampled(resnet, x_BCHW)
    if resnet.conv_shortcut is not None:
        x_BCHW = resnet.conv_shortcut(x_BCHW)
    return (x_BCHW + h_BCHW) / resnet.out_scale if resnet.out_scale != 1.0 else x_BCHW + h_BCHW


def _resampled(resnet: ResnetBlock, x_BCHW: Tensor) -> Tensor:
    if resnet.resample == "up":
        return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
    return F.avg_pool2d(x_BCHW, kernel_size=2, stride=2) if resnet.resample == "down" else x_BCHW


def _activated(resnet: ResnetBlock, emb_BT: Tensor) -> Tensor:
    return emb_BT if resnet.skip_time_act else resnet.nonlinearity(emb_BT)


def _film_bias(resnet: ResnetBlock) -> Tensor:
    bias = resnet.time_emb_proj.bias
    if not resnet.is_film:
        return bias
    scale, shift = bias.chunk(2)
    return torch.cat([1 + scale, shift])
