"""From a UNet's tree of modules to a program: one method for each kind of block.

B images  F what the time says to all layers  H height  W width  L text tokens  T time width
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.engines.native import Kernels
from floyd.engines.program import Film, Map, Program
from floyd.engines.weights import Segments, Weights, padded, spread
from floyd.models.unet import UNet2DConditionModel
from floyd.models.unet_blocks import DownBlock, MidBlock, UpBlock
from floyd.nn.attention import AddedKVAttention, Attention
from floyd.nn.resnet import ResnetBlock
from floyd.nn.transformer import Transformer2D, TransformerBlock


@dataclass(frozen=True, eq=False)
class Reader:
    """An attention layer's projections of the text."""

    norm: nn.GroupNorm | None
    key: nn.Linear
    value: nn.Linear
    heads: Segments

    def read(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, L, heads], padded as the kernels read them."""
        if self.norm is not None:
            text_BLD = self.norm(text_BLD.transpose(1, 2)).transpose(1, 2)
        key, value = (spread(layer(text_BLD), self.heads) for layer in (self.key, self.value))
        return key.contiguous(), value.contiguous()


class Walk:
    """What does not depend on the shape of the input, and how to write the program for one that is given."""

    def __init__(self, unet: UNet2DConditionModel, kernels: Kernels, weights: Weights) -> None:
        self.unet, self.kernels, self.weights = unet, kernels, weights
        self.readers = tuple(reader for layer in unet.attention_layers() for reader in _readers(layer))
        self.resnets = tuple(module for module in unet.modules() if isinstance(module, ResnetBlock))
        self.films: dict[ResnetBlock, Film] = {}
        self.film_width = 0
        for resnet in self.resnets:
            channels = padded(resnet.conv1.out_channels)
            is_film = resnet.is_film
            self.films[resnet] = Film(
                scale=self.film_width if is_film else None, shift=self.film_width + (channels if is_film else 0)
            )
            self.film_width += channels * (2 if is_film else 1)

    def films_of(self, emb_BT: Tensor) -> Tensor:
        """[B, F] of the embedding of time."""
        weight_FT, bias_F = self._film_weights()
        kinds = {(resnet.skip_time_act, type(resnet.nonlinearity)): resnet for resnet in self.resnets}
        if len(kinds) == 1:
            (resnet,) = kinds.values()
            return F.linear(emb_BT if resnet.skip_time_act else resnet.nonlinearity(emb_BT), weight_FT, bias_F)
        parts, start = [], 0
        for resnet in self.resnets:
            end = start + padded(resnet.conv1.out_channels) * (2 if resnet.is_film else 1)
            own_BT = emb_BT if resnet.skip_time_act else resnet.nonlinearity(emb_BT)
            parts.append(F.linear(own_BT, weight_FT[start:end], bias_F[start:end]))
            start = end
        return torch.cat(parts, dim=1)

    def _film_weights(self) -> tuple[Tensor, Tensor]:
        """All layers' projections of the time as one: [F, T] and [F]. 1 + scale, and the bias of a convolution to which
        time is added, are in the second."""
        time_width = self.unet.time_embedding.linear_2.out_features
        layers = [resnet.time_emb_proj for resnet in self.resnets]
        convs = [resnet.conv1 for resnet in self.resnets if not resnet.is_film]
        weight = self.weights.made(
            ("film weight",),
            lambda: tuple(layer.weight for layer in layers),
            self.film_width * time_width,
            lambda: torch.cat([_rows(resnet, resnet.time_emb_proj.weight) for resnet in self.resnets]),
        )
        bias = self.weights.made(
            ("film bias",),
            lambda: (*(layer.bias for layer in layers), *(_bias(conv) for conv in convs)),
            self.film_width,
            lambda: torch.cat([_film_bias(resnet) for resnet in self.resnets]),
        )
        return weight.view(self.film_width, time_width), bias

    def program(self, batch: int, height: int, wide: int, num_tokens: int) -> Program:
        self.num_tokens = num_tokens
        self.looks = iter(range(len(self.readers)))
        self.to = Program(self.kernels, self.weights, batch, self.film_width)
        unet, config = self.unet, self.unet.config
        x = self.to.conv(self.to.read(config.in_channels, height, wide), unet.conv_in)
        skips = [x.keep()]
        for down in unet.down_blocks:
            assert isinstance(down, DownBlock)
            x = self._down(x, down, skips)
        assert isinstance(unet.mid_block, MidBlock)
        first, last = unet.mid_block.resnets
        x = self._resnet(x, first)
        x = self._attended(x, unet.mid_block.attentions[0])
        x = self._resnet(x, last)
        for up in unet.up_blocks:
            assert isinstance(up, UpBlock)
            x = self._up(x, up, skips)
        x = self.to.norm(x, None, unet.conv_norm_out, unet.conv_act)
        self.to.write(self.to.conv(x, unet.conv_out))
        self.to.finish()
        return self.to

    # ---------------------------------------------------------------------------------------------------------- blocks

    def _down(self, x: Map, down: DownBlock, skips: list[Map]) -> Map:
        for i, resnet in enumerate(down.resnets):
            x = self._resnet(x, resnet)
            if len(down.attentions):
                x = self._attended(x, down.attentions[i])
            skips.append(x.keep())
        for sampler in down.downsamplers:
            x = self._resnet(x, sampler) if isinstance(sampler, ResnetBlock) else self.to.conv(x, _conv(sampler))
            skips.append(x.keep())
        return x

    def _up(self, x: Map, up: UpBlock, skips: list[Map]) -> Map:
        for i, resnet in enumerate(up.resnets):
            x = self._resnet(x, resnet, skips.pop())
            if len(up.attentions):
                x = self._attended(x, up.attentions[i])
        for sampler in up.upsamplers:
            if isinstance(sampler, ResnetBlock):
                x = self._resnet(x, sampler)
            else:
                x = self.to.conv(x, _conv(sampler), size=(skips[-1].height, skips[-1].width))
        return x

    def _resnet(self, x: Map, resnet: Any, skip: Map | None = None) -> Map:
        doubles, halves = resnet.resample == "up", resnet.resample == "down"
        film = self.films[resnet]
        h = self.to.norm(
            x.keep(), None if skip is None else skip.keep(), resnet.norm1, resnet.nonlinearity, pools=halves
        )
        size = (2 * h.height, 2 * h.width) if doubles else None
        h = self.to.conv(h, resnet.conv1, size=size, film=None if resnet.is_film else film)
        h = self.to.norm(h, None, resnet.norm2, resnet.nonlinearity, film=film if resnet.is_film else None)
        alpha = factor = 1 / resnet.out_scale
        if halves:
            x, alpha = self.to.pool(x, factor), 1.0
        elif resnet.conv_shortcut is not None:
            x, alpha = self._shortcut(x, skip, resnet.conv_shortcut, factor), 1.0
        return self.to.conv(h, resnet.conv2, factor=factor, add=x, alpha=alpha)

    def _shortcut(self, x: Map, skip: Map | None, conv: nn.Conv2d, factor: float) -> Map:
        """A 1 x 1 convolution of x with the skip behind it: each of the two has columns of its own."""
        out, channels = (conv.out_channels,), x.segments[0]
        bias = self.weights.bias([conv], out, factor)
        weight = self.weights.linear([conv], x.segments, out, factor, part=slice(0, channels))
        h = self.to.linear(x, weight, bias, out)
        if skip is None:
            return h
        weight = self.weights.linear([conv], skip.segments, out, factor, part=slice(channels, None))
        return self.to.linear(skip, weight, None, out, add=h)

    def _attended(self, x: Map, layer: nn.Module) -> Map:
        if isinstance(layer, Transformer2D):
            return self._transformed(x, layer)
        assert isinstance(layer, AddedKVAttention)
        heads = _heads(layer.to_q, layer.num_heads)
        sources = [layer.to_q] if layer.only_cross_attention else [layer.to_q, layer.to_k, layer.to_v]
        h = self.to.norm(x.keep(), None, layer.group_norm)
        h = self._projected(h, sources, heads)
        looks_at_pixels = not layer.only_cross_attention
        h = self.to.attention(
            h, heads, text=next(self.looks), num_tokens=self.num_tokens, looks_at_pixels=looks_at_pixels
        )
        return self._projected(h, [layer.to_out[0]], x.segments, add=x)

    def _transformed(self, x: Map, layer: Transformer2D) -> Map:
        block = layer.transformer_blocks[0]
        assert isinstance(block, TransformerBlock)
        inner = (layer.proj_in.weight.shape[0],)
        h = self._projected(self.to.norm(x.keep(), None, layer.norm), [layer.proj_in], inner)
        h = self._looked(h, block.norm1, block.attn1, at_text=block.only_cross_attention)
        h = self._looked(h, block.norm2, block.attn2, at_text=True)
        wide, narrow = _proj(block.ff.net[0]), block.ff.net[-1]
        gated = self.to.layer_norm(h.keep(), block.norm3)
        gated = self._projected(gated, [wide], (wide.out_features // 2,) * 2)
        h = self._projected(self.to.geglu(gated), [narrow], inner, add=h)
        return self._projected(h, [layer.proj_out], x.segments, add=x)

    def _looked(self, x: Map, norm: nn.LayerNorm, layer: Attention, *, at_text: bool) -> Map:
        heads = _heads(layer.to_q, layer.num_heads)
        sources = [layer.to_q] if at_text else [layer.to_q, layer.to_k, layer.to_v]
        h = self._projected(self.to.layer_norm(x.keep(), norm), sources, heads)
        text = next(self.looks) if at_text else None
        h = self.to.attention(h, heads, text=text, num_tokens=self.num_tokens, looks_at_pixels=not at_text)
        return self._projected(h, [layer.to_out[0]], x.segments, add=x)

    def _projected(self, x: Map, layers: list[Any], segments: Segments, add: Map | None = None) -> Map:
        """Layers beside each other, each of which writes `segments`."""
        weight, bias = self.weights.linear(layers, x.segments, segments), self.weights.bias(layers, segments)
        return self.to.linear(x, weight, bias, segments * len(layers), add=add)


def _readers(layer: AddedKVAttention | Transformer2D) -> Iterator[Reader]:
    """In the order in which the layer looks at the text."""
    if isinstance(layer, AddedKVAttention):
        heads = _heads(layer.to_q, layer.num_heads)
        yield Reader(layer.norm_cross, layer.add_k_proj, layer.add_v_proj, heads)
        return
    block = layer.transformer_blocks[0]
    assert isinstance(block, TransformerBlock)
    for attention in (block.attn1, block.attn2) if block.only_cross_attention else (block.attn2,):
        yield Reader(None, attention.to_k, attention.to_v, _heads(attention.to_q, attention.num_heads))


def _heads(to_q: nn.Linear, num_heads: int) -> Segments:
    return (to_q.weight.shape[0] // num_heads,) * num_heads


def _conv(sampler: Any) -> nn.Conv2d:
    conv: nn.Conv2d = sampler.conv
    return conv


def _proj(geglu: Any) -> nn.Linear:
    proj: nn.Linear = geglu.proj
    return proj


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _rows(resnet: ResnetBlock, x: Tensor) -> Tensor:
    """What belongs to a layer's channels, in the first axis, put where they lie."""
    channels = resnet.conv1.out_channels
    return spread(x.movedim(0, -1), (channels,) * (2 if resnet.is_film else 1)).movedim(-1, 0)


def _film_bias(resnet: ResnetBlock) -> Tensor:
    bias = _rows(resnet, resnet.time_emb_proj.bias)
    channels = resnet.conv1.out_channels
    if resnet.is_film:
        return bias + spread(torch.cat([torch.ones(channels), torch.zeros(channels)]), (channels, channels))
    return bias + spread(_bias(resnet.conv1), (channels,))
