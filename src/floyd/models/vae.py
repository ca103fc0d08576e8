"""The autoencoder of stage III: pictures to latents and back (latent diffusion, arXiv:2112.10752, section 3.1).

B images  C channels  H height  W width  Z latent channels  M moments (mean and log-variance, 2Z)  h, w of the latent
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from floyd.errors import ConfigError
from floyd.models.tiling import tiled
from floyd.nn.autoencoder import ACTIVATIONS, EPS, DownEncoderBlock, MiddleBlock, UpDecoderBlock
from floyd.nn.norm import normed
from floyd.store.config import Config
from floyd.store.pretrained import Model

Draw = Callable[[Tensor], Tensor]  # normal noise of another tensor's shape, place and precision: a `Noise`
LEGACY_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(Config):
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for key, allowed in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = self[key]
            if set(types) != {allowed}:
                raise ConfigError(f"{key} must be {allowed} on every level, got {types}.")
            if len(types) != levels:
                raise ConfigError(f"{key} names {len(types)} levels, block_out_channels {levels}: make them equal.")
        if self.act_fn not in ACTIVATIONS:
            raise ConfigError(f"act_fn must be one of {', '.join(ACTIVATIONS)}, got {self.act_fn!r}.")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ConfigError(
                f"block_out_channels must be multiples of norm_num_groups ({self.norm_num_groups}), "
                f"got {self.block_out_channels}."
            )


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """What an encoder knows of a latent: a normal distribution for each of its numbers."""

    moments_BMhw: Tensor

    @property
    def mean(self) -> Tensor:
        return self.moments_BMhw.chunk(2, dim=1)[0]

    @cached_property
    def logvar(self) -> Tensor:
        return self.moments_BMhw.chunk(2, dim=1)[1].clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, noise: Draw) -> Tensor:
        """One draw."""
        return self.mean + self.std * noise(self.mean)

    def kl(self) -> Tensor:
        """How far from the standard normal distribution, one number per image."""
        return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKLOutput(NamedTuple):
    latent_dist: DiagonalGaussian


class DecoderOutput(NamedTuple):
    sample: Tensor


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        common: dict[str, Any] = {"groups": config.norm_num_groups, "act_fn": config.act_fn}
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            halves = level < len(widths) - 1
            block = DownEncoderBlock(before, width, num_layers=config.layers_per_block, halves=halves, **common)
            self.down_blocks.append(block)
        self.mid_block = MiddleBlock(widths[-1], attends=config.mid_block_add_attention, **common)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for block in self.down_blocks:
            x_BCHW = block(x_BCHW)
        x_BCHW = self.mid_block(x_BCHW)
        return self.conv_out(normed(self.conv_norm_out, x_BCHW, nn.functional.silu))


class Decoder(nn.Module):
    """The encoder's mirror image, with one more residual block on each level."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        common: dict[str, Any] = {"groups": config.norm_num_groups, "act_fn": config.act_fn}
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MiddleBlock(widths[0], attends=config.mid_block_add_attention, **common)
        self.up_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            doubles = level < len(widths) - 1
            block = UpDecoderBlock(before, width, num_layers=config.layers_per_block + 1, doubles=doubles, **common)
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z_BZhw: Tensor) -> Tensor:
        x_BCHW = self.mid_block(self.conv_in(z_BZhw))
        for block in self.up_blocks:
            x_BCHW = block(x_BCHW)
        return self.conv_out(normed(self.conv_norm_out, x_BCHW, nn.functional.silu))


class AutoencoderKL(Model):
    """Encodes pictures as latents, decodes latents as pictures; scaling the latents is the caller's part.

    Each level but the last halves the sides: a picture's sides must be multiples of 2 ** (levels - 1).
    """

    config_class = AutoencoderKLConfig
    config: AutoencoderKLConfig
    tile_side: int | None = None  # latents on a side of a tile that is decoded at once; None: the whole picture
    is_sliced: bool = False  # one image at a time

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        config = self.config
        num_moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(num_moments, num_moments, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = (
            nn.Conv2d(config.latent_channels, config.latent_channels, 1)
            if config.use_post_quant_conv
            else nn.Identity()
        )

    @property
    def compression(self) -> int:
        """How many pixels lie side by side in one latent pixel."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @classmethod
    def rename_keys(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights under today's names: old files call the attention's layers otherwise."""
        return {_modern(key): weight for key, weight in state_dict.items()}

    def encode(self, x_BCHW: Tensor, *, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        self._check(x_BCHW, "a picture", self.config.in_channels, multiple=self.compression)
        distribution = DiagonalGaussian(self.quant_conv(self.encoder(x_BCHW)))
        return AutoencoderKLOutput(distribution) if return_dict else (distribution,)

    def decode(
        self, z_BZhw: Tensor, *, return_dict: bool = True, by: Callable[[Tensor], Tensor] | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """`by`: what decodes in the decoder's stead, slices and tiles as it is handed them."""
        self._check(z_BZhw, "latents", self.config.latent_channels, multiple=1)
        decoded = partial(self._decoded, by=by or self._decoded_whole)
        if self.is_sliced and len(z_BZhw) > 1:
            x_BCHW = torch.cat([decoded(z_1Zhw) for z_1Zhw in z_BZhw.split(1)])
        else:
            x_BCHW = decoded(z_BZhw)
        return DecoderOutput(x_BCHW) if return_dict else (x_BCHW,)

    def _decoded(self, z_BZhw: Tensor, *, by: Callable[[Tensor], Tensor]) -> Tensor:
        if self.tile_side is None or max(z_BZhw.shape[-2:]) <= self.tile_side:
            return by(z_BZhw)
        return tiled(by, z_BZhw, side=self.tile_side, factor=self.compression)

    def _decoded_whole(self, z_BZhw: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z_BZhw))

    def enable_tiling(self, use_tiling: bool = True, *, side: int = 128) -> None:
        """Decode larger pictures in tiles of `side` latents: with less memory, and colours that drift a little."""
        self.tile_side = side if use_tiling else None

    def disable_tiling(self) -> None:
        self.tile_side = None

    def enable_slicing(self) -> None:
        """Decode one image of a batch at a time: the same pictures, with the memory of one."""
        self.is_sliced = True

    def disable_slicing(self) -> None:
        self.is_sliced = False

    def forward(
        self, x_BCHW: Tensor, *, noise: Draw | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """The picture after a journey through the latents: through their mean, or with `noise` through one draw."""
        (distribution,) = self.encode(x_BCHW)
        z_BZhw = distribution.mode() if noise is None else distribution.sample(noise)
        return self.decode(z_BZhw, return_dict=return_dict)

    def _check(self, x: Tensor, what: str, channels: int, *, multiple: int) -> None:
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"Expected {what} of shape (batch, {channels}, height, width), got {tuple(x.shape)}.")
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f"Height and width must be multiples of {multiple}, got {tuple(x.shape[2:])}.")


def _modern(key: str) -> str:
    head, found, tail = key.rpartition(".attentions.0.")
    name, dot, parameter = tail.rpartition(".")
    return f"{head}{found}{LEGACY_ATTENTION_NAMES.get(name, name)}{dot}{parameter}" if found else key
