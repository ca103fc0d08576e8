"""Stage I of the built-in cascade: captions to 64 px.

B images  C channels  H height  W width  L text tokens  E encoder width
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.apps.mini.data import pictures_of, scenes_at, texts_of, things_of
from floyd.diffusion.losses import hybrid_loss, layout_density, log_snr, stratified_timesteps
from floyd.diffusion.schedule import NoiseSchedule
from floyd.models.unet import UNet2DConditionModel
from floyd.nn.norm import normed
from floyd.training.growing import keep_resolution
from floyd.training.init import zero_residuals
from floyd.training.loop import LoopConfig, Losses, Phase, device_of

UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (16, 32, 96, 192),
    "layers_per_block": (1, 1, 1, 2),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2 + ("SimpleCrossAttnDownBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",) * 2,
    "cross_attention_dim": 128,
    "encoder_hid_dim": 128,
    "encoder_hid_dim_type": "text_proj",
    "attention_head_dim": 32,
    "only_cross_attention": (True, True, True, False),  # pixels look at each other at 8 px alone
    "mid_block_only_cross_attention": False,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
    "norm_num_groups": 8,
    "time_embedding_dim": 256,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}
# Of the noise's error at the noisy end: the weight of the clean picture's error down to a log SNR of -4.
MOST_WEIGHT = 60.0
FINISH_SNR = 100.0  # of whole pictures, up to which the noise itself is asked for: less leaves grain
CLEAN_WEIGHT = 3.0  # of what the heads on the inner levels are told
THING_WEIGHT = 8.0  # of a pixel of a thing, over one of the background, in the same
NEAR_WEIGHT = 5.0  # of a pixel on or within NEAR of a thing, over all others, in the noise: outlines are few pixels
NEAR = 3
HEADS = (1, 2)  # on which levels going up
LOOP = LoopConfig(
    phases=(
        Phase(num_steps=2000, batch_size=32, size=16, rate=1e-3, last_rate=1e-3),
        Phase(num_steps=1500, batch_size=32, size=32, rate=1e-3, last_rate=1e-3),
        Phase(num_steps=1500, batch_size=24, size=64, rate=1e-3, last_rate=8.5e-4),
        Phase(num_steps=3000, batch_size=24, size=64, rate=8.5e-4, last_rate=1e-5),
    ),
    optimizer="muon",
    weight_decay=0.01,
    ema_decay=0.99,  # the rate decays to nothing: a longer memory would only hold worse weights
    seed=31,
)


class Apprentice(nn.Module):
    """The UNet with heads on two of its levels that say what the clean picture is; they serve in training alone.

    The error of the noise hardly tells the inner levels what the text asks for: where all is noise, the clean picture
    is a hundredth of x. These heads ask them directly.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        widths = list(reversed(unet.config.block_out_channels))
        self.conv_out = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, widths[level]), nn.GELU(), nn.Conv2d(widths[level], 3, 1)) for level in HEADS
        )

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BLE: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The UNet's output, and the clean pictures that the heads see, smaller ones first."""
        features: list[Tensor] = []
        blocks = [self.unet.up_blocks[level] for level in HEADS]
        hooks = [block.register_forward_hook(lambda _, __, out_BCHW: features.append(out_BCHW)) for block in blocks]
        try:
            out_BCHW = self.unet(x_BCHW, t_B, text_BLE, return_dict=False)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return out_BCHW, [_seen(head, feature) for head, feature in zip(self.conv_out, features, strict=True)]


def _seen(head: Any, x_BCHW: Tensor) -> Tensor:
    norm, act, conv = head
    seen_B3HW: Tensor = conv(normed(norm, x_BCHW, act))
    return seen_B3HW


def build_unet() -> UNet2DConditionModel:
    torch.manual_seed(LOOP.seed)
    unet = UNet2DConditionModel(**UNET)
    zero_residuals(unet)
    return unet


Embed = Callable[[list[str]], Tensor]  # captions -> [B, 77, E]


def denoising_loss(embed: Embed) -> Any:
    """The hybrid loss of stage I for `Trainer`, and what the heads are told. Pictures below 64 px train the inside."""
    schedule = NoiseSchedule.cosine()
    snr_T = log_snr(schedule).exp()
    layout_T = layout_density(schedule, low=-10.0, high=0.0, share=0.7)
    finish_T = layout_density(schedule, low=-8.0, high=0.0, share=0.35)

    def loss_of(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
        assert isinstance(model, Apprentice)
        device = device_of(model)
        scenes = scenes_at(LOOP.seed, step, phase.batch_size)
        clean_BCHW = pictures_of(scenes, phase.size).to(device)
        things_B1HW = things_of(scenes, phase.size).to(device)
        text_BLE = embed(texts_of(scenes, generator)).to(device)
        is_whole = phase.size == UNET["sample_size"]
        t_B = stratified_timesteps(finish_T if is_whole else layout_T, phase.batch_size, generator).to(device)

        shrunk = phase.size / UNET["sample_size"]  # a mean of n pixels has a noise that is sqrt(n) times smaller
        keep_resolution(model.unet, round(-math.log2(shrunk)))
        noise_BCHW = shrunk * torch.randn(clean_BCHW.shape, generator=generator).to(device)
        out_BCHW, seen = model(schedule.noised(clean_BCHW, noise_BCHW, t_B), t_B, text_BLE)

        most_snr = FINISH_SNR if is_whole else 5.0
        weight_T = torch.minimum(
            (snr_T / shrunk**2).clamp(1.0, most_snr) / snr_T, torch.tensor(MOST_WEIGHT / shrunk**2)
        )
        near_B1HW = 1 + NEAR_WEIGHT * F.max_pool2d(things_B1HW, 2 * NEAR + 1, stride=1, padding=NEAR) if is_whole else 1
        simple_B, bound_B = hybrid_loss(out_BCHW, clean_BCHW, noise_BCHW, t_B, schedule, weight_T, near_B1HW)
        losses = {"noise": simple_B.mean()}
        if is_whole:
            losses["variance"] = bound_B.mean()
        for picture_BCHW in seen:
            losses[f"clean_{picture_BCHW.shape[-1]}"] = losses.get(f"clean_{picture_BCHW.shape[-1]}", 0) + (
                CLEAN_WEIGHT * _clean_error(picture_BCHW.float(), clean_BCHW, things_B1HW)
            )
        return losses

    return loss_of


def _clean_error(seen_BCHW: Tensor, clean_BCHW: Tensor, things_B1HW: Tensor) -> Tensor:
    size = seen_BCHW.shape[-1]
    target_BCHW, things_B1HW = (F.adaptive_avg_pool2d(x_BCHW, size) for x_BCHW in (clean_BCHW, things_B1HW))
    return ((seen_BCHW - target_BCHW).square() * (1 + THING_WEIGHT * things_B1HW)).mean()
