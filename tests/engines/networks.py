"""Tiny networks that between them have every feature an engine must know, and what they are given."""

from __future__ import annotations

from typing import Any

import torch
from tests import tiny
from torch import Tensor

from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL

_ATTENTION = ("SimpleCrossAttnDownBlock2D",) * 2
_LEVELS: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", *_ATTENTION),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (16, 32, 96),
    "norm_num_groups": 8,
}

NETWORKS: dict[str, dict[str, Any]] = {
    "stage I": tiny.STAGE_ONE,
    "stage II": tiny.STAGE_TWO,
    "upscaler": tiny.UPSCALER,
    "three levels": {**tiny.STAGE_ONE, **_LEVELS},
    "levels that differ": {
        **tiny.STAGE_TWO,
        **_LEVELS,
        "layers_per_block": (1, 2, 3),
        "only_cross_attention": (True, False, True),
        "attention_head_dim": (8, 16, 32),
    },
    "odd widths": {**tiny.STAGE_ONE, "block_out_channels": (24, 40), "norm_num_groups": 4, "attention_head_dim": 20},
    "only the text": {**tiny.STAGE_ONE, "only_cross_attention": True, "mid_block_only_cross_attention": False},
    "text at its own width": {
        **tiny.STAGE_ONE, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "cross_attention_norm": None,
    },
    "time that is added": {**tiny.STAGE_ONE, "resnet_time_scale_shift": "default"},
    "SiLU, kernels, a centred input": {
        **tiny.STAGE_ONE, "act_fn": "silu", "conv_in_kernel": 1, "conv_out_kernel": 5, "center_input_sample": True,
    },
    "Mish, a sinusoid with the sine first": {
        **tiny.STAGE_ONE, "act_fn": "mish", "flip_sin_to_cos": False, "freq_shift": 1,
    },
    "ReLU, a middle scale": {**tiny.STAGE_TWO, "act_fn": "relu", "mid_block_scale_factor": 2.0},
    "upscaler of odd widths": {**tiny.UPSCALER, "block_out_channels": (24, 24, 48), "norm_num_groups": 2,
                               "attention_head_dim": 2},
    "upscaler with convolutions around the transformer": {
        **tiny.UPSCALER, "use_linear_projection": False, "only_cross_attention": False, "mid_block_scale_factor": 2.0,
    },
    "upscaler whose time scales and shifts": {
        **tiny.UPSCALER, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": None,
    },
}  # fmt: skip


def network(name: str = "stage I", seed: int = 0) -> UNet2DConditionModel:
    """Every parameter is disturbed: fresh norms hide mistakes behind their ones and zeros."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**NETWORKS[name]).requires_grad_(False)
    disturbed: UNet2DConditionModel = tiny.disturbed(unet, seed, amount=0.1)
    return disturbed


def given(
    unet: UNet2DConditionModel, batch: int = 2, size: tuple[int, int] = (16, 16), tokens: int = 5
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Picture, text and labels."""
    torch.manual_seed(1)
    config = unet.config
    text_BLE = torch.randn(batch, tokens, config.encoder_hid_dim or config.cross_attention_dim)
    labels_B = None if unet.class_embedding is None else torch.arange(7, 7 + 5 * batch, 5)
    return torch.randn(batch, config.in_channels, *size), text_BLE, labels_B


@torch.no_grad()
def stepped(runner: Any, x_BCHW: Tensor, text_BLE: Tensor, labels_B: Tensor | None, t: float = 321) -> Tensor:
    """By the network itself, or by an engine."""
    out: Tensor = runner.step(x_BCHW, t, runner.read(text_BLE, labels_B))
    return out


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def autoencoder(*widths: int, attends: bool = True, act: str = "silu") -> AutoencoderKL:
    torch.manual_seed(0)
    types = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    sizes = {"layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
    vae = AutoencoderKL(block_out_channels=widths, act_fn=act, mid_block_add_attention=attends, **types, **sizes)
    return vae.eval()
