"""One level of the UNet, going down, in the middle and going up; what a block type means stands in configs.

Every block lists its `layers` in the order in which it asks for them to be `told` something.

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from floyd.errors import ConfigError
from floyd.models.configs import BlockType, UNetConfig
from floyd.models.unet_told import Told
from floyd.nn.attention import AddedKVAttention
from floyd.nn.resnet import Downsample, ResnetBlock, Upsample
from floyd.nn.transformer import Transformer2D


@dataclass(frozen=True)
class Style:
    """How residual and attention blocks are built at one level."""

    config: UNetConfig
    head_width: int = 0  # of IF's attention
    num_heads: int = 0  # of transformers: the same key of the checkpoint, attention_head_dim, means both
    only_cross: bool = False
    simple_scale: float = 1.0
    plain_scale: float = 1.0

    @classmethod
    def of(cls, config: UNetConfig) -> Style:
        return cls(config)

    def at_level(self, level: int) -> Style:
        config = self.config
        return replace(
            self,
            head_width=config.head_dim_at(level),
            num_heads=config.head_dim_at(level),
            only_cross=config.only_cross_at(level),
            simple_scale=config.resnet_out_scale_factor,
        )

    def at_level_up(self, level: int) -> Style:
        """As going down, but IF's attention has the head width of the opposite level: diffusers' weights are so."""
        opposite = len(self.config.block_out_channels) - 1 - level
        return replace(self.at_level(level), head_width=self.config.head_dim_at(opposite))

    def at_middle(self) -> Style:
        config = self.config
        return replace(
            self,
            head_width=config.head_dim_at(-1),
            num_heads=config.head_dim_at(-1),
            only_cross=config.only_cross_in_the_middle,
            simple_scale=config.mid_block_scale_factor,
            plain_scale=config.mid_block_scale_factor,
        )

    def resnet(self, block: BlockType, in_channels: int, channels: int, resample: str | None = None) -> ResnetBlock:
        config = self.config
        return ResnetBlock(
            in_channels,
            channels,
            time_width=config.time_width,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            act_fn=config.act_fn,
            dropout=config.dropout,
            time_scale_shift=config.resnet_time_scale_shift,
            skip_time_act=block.is_simple and config.resnet_skip_time_act,
            out_scale=self.simple_scale if block.is_simple else self.plain_scale,
            resample=resample,
        )

    def attention(self, block: BlockType, channels: int) -> nn.Module:
        config = self.config
        per_level = self.head_width if block.attention == "added_kv" else self.num_heads
        if not 1 <= per_level <= channels:
            raise ConfigError(
                f"attention_head_dim must be in [1, {channels}] at a level of {channels} channels, got {per_level}: "
                "its attention would have no heads, or heads of no width."
            )
        if block.attention == "added_kv":
            return AddedKVAttention(
                channels,
                config.cross_attention_dim,
                head_width=self.head_width,
                groups=config.norm_num_groups,
                norm_text=config.cross_attention_norm == "group_norm",
                only_cross_attention=self.only_cross,
            )
        return Transformer2D(
            channels,
            config.cross_attention_dim,
            num_heads=self.num_heads,
            groups=config.norm_num_groups,
            linear_projection=config.use_linear_projection,
            only_cross_attention=self.only_cross,
        )

    def attentions(self, block: BlockType, channels: int, count: int) -> nn.ModuleList:
        return nn.ModuleList(self.attention(block, channels) for _ in range(count if block.attention else 0))


class DownBlock(nn.Module):
    """`num_layers` residual (and attention) layers, then half the size unless it is the last."""

    def __init__(
        self, block: BlockType, style: Style, *, in_channels: int, channels: int, num_layers: int, is_last: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * (num_layers - 1)
        self.resnets = nn.ModuleList(style.resnet(block, width, channels) for width in widths)
        self.attentions = style.attentions(block, channels, num_layers)
        self.downsamplers = nn.ModuleList()
        if not is_last:
            self.downsamplers.append(
                style.resnet(block, channels, channels, "down") if block.is_simple else Downsample(channels)
            )

    def forward(self, x_BCHW: Tensor, told: Told, skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x_BCHW = told.resnet(resnet, x_BCHW)
            if len(self.attentions):
                x_BCHW = told.attention(self.attentions[i], x_BCHW)
            skips.append(x_BCHW)
        for sampler in self.downsamplers:
            is_simple = isinstance(sampler, ResnetBlock)
            x_BCHW = told.resnet(sampler, x_BCHW) if is_simple else told.convolution(sampler, x_BCHW)
            skips.append(x_BCHW)
        return x_BCHW

    def layers(self) -> Iterator[nn.Module]:
        yield from _in_turns(self.resnets, self.attentions)
        yield from self.downsamplers


class MidBlock(nn.Module):
    """Residual, attention, residual at the smallest size."""

    def __init__(self, block: BlockType, style: Style, channels: int) -> None:
        super().__init__()
        if block.attention == "transformer":
            style = replace(style, only_cross=False)
        self.resnets = nn.ModuleList(style.resnet(block, channels, channels) for _ in range(2))
        self.attentions = style.attentions(block, channels, 1)

    def forward(self, x_BCHW: Tensor, told: Told) -> Tensor:
        x_BCHW = told.resnet(self.resnets[0], x_BCHW)
        x_BCHW = told.attention(self.attentions[0], x_BCHW)
        return told.resnet(self.resnets[1], x_BCHW)

    def layers(self) -> Iterator[nn.Module]:
        yield from (self.resnets[0], self.attentions[0], self.resnets[1])


class UpBlock(nn.Module):
    """`num_layers` layers that each take one skip, then twice the size unless it is the last."""

    def __init__(
        self,
        block: BlockType,
        style: Style,
        *,
        in_channels: int,
        previous_channels: int,
        channels: int,
        num_layers: int,
        is_last: bool,
    ) -> None:
        super().__init__()
        inputs = [previous_channels] + [channels] * (num_layers - 1)
        skips = [channels] * (num_layers - 1) + [in_channels]
        self.resnets = nn.ModuleList(
            style.resnet(block, width + skip, channels) for width, skip in zip(inputs, skips, strict=True)
        )
        self.attentions = style.attentions(block, channels, num_layers)
        self.upsamplers = nn.ModuleList()
        if not is_last:
            self.upsamplers.append(
                style.resnet(block, channels, channels, "up") if block.is_simple else Upsample(channels)
            )

    def forward(self, x_BCHW: Tensor, told: Told, skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x_BCHW = told.resnet(resnet, torch.cat([x_BCHW, skips.pop()], dim=1))
            if len(self.attentions):
                x_BCHW = told.attention(self.attentions[i], x_BCHW)
        for sampler in self.upsamplers:
            if isinstance(sampler, ResnetBlock):
                x_BCHW = told.resnet(sampler, x_BCHW)
            else:
                size = (skips[-1].shape[-2], skips[-1].shape[-1])
                x_BCHW = told.convolution(sampler, x_BCHW, size)
        return x_BCHW

    def layers(self) -> Iterator[nn.Module]:
        yield from _in_turns(self.resnets, self.attentions)
        yield from self.upsamplers


def _in_turns(resnets: nn.ModuleList, attentions: nn.ModuleList) -> Iterator[nn.Module]:
    for i, resnet in enumerate(resnets):
        yield resnet
        if len(attentions):
            yield attentions[i]
