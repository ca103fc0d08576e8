"""What a UNet's config.json may say, and the six networks that exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from floyd.errors import ConfigError
from floyd.nn.activation import ACTIVATIONS
from floyd.store.config import Config


@dataclass(frozen=True)
class BlockType:
    """What a `…Block2D` of a config.json means."""

    attention: str | None  # None | "added_kv" (IF) | "transformer" (latent UNets)
    is_simple: bool  # IF's: resampled by residual blocks, and scaled by resnet_out_scale_factor


DOWN_BLOCKS = {
    "ResnetDownsampleBlock2D": BlockType(None, is_simple=True),
    "SimpleCrossAttnDownBlock2D": BlockType("added_kv", is_simple=True),
    "DownBlock2D": BlockType(None, is_simple=False),
    "CrossAttnDownBlock2D": BlockType("transformer", is_simple=False),
}
MID_BLOCKS = {
    "UNetMidBlock2DSimpleCrossAttn": BlockType("added_kv", is_simple=True),
    "UNetMidBlock2DCrossAttn": BlockType("transformer", is_simple=False),
}
UP_BLOCKS = {
    "SimpleCrossAttnUpBlock2D": BlockType("added_kv", is_simple=True),
    "ResnetUpsampleBlock2D": BlockType(None, is_simple=True),
    "CrossAttnUpBlock2D": BlockType("transformer", is_simple=False),
    "UpBlock2D": BlockType(None, is_simple=False),
}

# key -> the values that floyd honours; anything else is refused by name rather than ignored.
_HONOURED: dict[str, tuple[Any, ...]] = {
    "act_fn": tuple(ACTIVATIONS),
    "addition_embed_type": (None, "text"),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "class_embed_type": (None, "timestep"),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None, "group_norm"),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "mid_block_type": tuple(MID_BLOCKS),
    "num_attention_heads": (None,),  # diffusers refuses it too: attention_head_dim is what checkpoints carry
    "projection_class_embeddings_input_dim": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None, *ACTIVATIONS),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
}

_PER_LEVEL = ("down_block_types", "up_block_types", "only_cross_attention", "attention_head_dim", "layers_per_block")


@dataclass(frozen=True, kw_only=True)
class UNetConfig(Config):
    """Defaults are those of a file that leaves the key out."""

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int = 1
    reverse_transformer_layers_per_block: tuple[int, ...] | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False  # no effect: scaled_dot_product_attention accumulates in float32 by itself
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64

    def __post_init__(self) -> None:
        for key, allowed in _HONOURED.items():
            if self[key] not in allowed:
                raise ConfigError(f"{key} must be one of {allowed} for floyd's UNet, got {self[key]!r}.")
        levels = len(self.block_out_channels)
        for key in _PER_LEVEL:
            if isinstance(self[key], tuple) and len(self[key]) != levels:
                raise ConfigError(f"{key} needs one entry per level, {levels}, got {len(self[key])}: {self[key]!r}.")
        for key, blocks in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            if unknown := [kind for kind in self[key] if kind not in blocks]:
                raise ConfigError(f"{key} must be of {', '.join(blocks)}, got {', '.join(map(repr, unknown))}.")
        if self.encoder_hid_dim_type is not None and self.encoder_hid_dim is None:
            raise ConfigError(
                f"encoder_hid_dim must be the text encoder's width for encoder_hid_dim_type "
                f"{self.encoder_hid_dim_type!r}, got None."
            )

    @property
    def time_width(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def side_multiple(self) -> int:
        """What a picture's sides must be multiples of; latent UNets enlarge to whatever size the skips have."""
        is_simple = any(UP_BLOCKS[kind].is_simple for kind in self.up_block_types)
        return 2 ** (len(self.block_out_channels) - 1) if is_simple else 1

    def layers_at(self, level: int) -> int:
        return self._at(self.layers_per_block, level)

    def head_dim_at(self, level: int) -> int:
        return self._at(self.attention_head_dim, level)

    def only_cross_at(self, level: int) -> bool:
        return self._at(self.only_cross_attention, level)

    @property
    def only_cross_in_the_middle(self) -> bool:
        if self.mid_block_only_cross_attention is not None:
            return self.mid_block_only_cross_attention
        return self.only_cross_attention is True

    @staticmethod
    def _at(value: Any, level: int) -> Any:
        return value[level] if isinstance(value, tuple) else value


def _deepfloyd(width: int, **keys: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "act_fn": "gelu",
        "addition_embed_type": "text",
        "attention_head_dim": 64,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "out_channels": 6,
        "resnet_time_scale_shift": "scale_shift",
    }
    return {**common, "cross_attention_dim": keys["block_out_channels"][-1], **keys}


def _stage_one(width: int) -> dict[str, Any]:
    return _deepfloyd(
        width,
        sample_size=64,
        in_channels=3,
        block_out_channels=(width, 2 * width, 3 * width, 4 * width),
        layers_per_block=3,
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    )


def _stage_two(width: int) -> dict[str, Any]:
    return _deepfloyd(
        width,
        sample_size=256,
        in_channels=6,
        block_out_channels=(width, 2 * width, 4 * width, 6 * width, 8 * width),
        layers_per_block=(2, 2, 3, 5, 5),
        down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("SimpleCrossAttnDownBlock2D",) * 2,
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",) * 3,
        class_embed_type="timestep",
        time_embedding_dim=8 * width,
        time_embedding_act_fn="gelu",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1.4142271248762552,
        mid_block_scale_factor=1.4142271248762552,
    )


# The published networks. A checkpoint's own config.json always wins over these rows.
PRESETS: dict[str, dict[str, Any]] = {
    "IF-I-M": _stage_one(192),
    "IF-I-L": _stage_one(320),
    "IF-I-XL": _stage_one(704),
    "IF-II-M": _stage_two(96),
    "IF-II-L": _stage_two(160),
    "x4-upscaler": {
        "sample_size": 128,
        "in_channels": 7,
        "block_out_channels": (256, 512, 512, 1024),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        "attention_head_dim": 8,
        "cross_attention_dim": 1024,
        "only_cross_attention": (True, True, True, False),
        "num_class_embeds": 1000,
        "use_linear_projection": True,
    },
}
