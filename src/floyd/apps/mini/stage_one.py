"""Stage I of the built-in cascade: captions to 64 px.

B images  C channels  H height  W width  L text tokens  E encoder width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from floyd.apps.mini.data import pictures_of, scenes_at, texts_of
from floyd.diffusion.losses import hybrid_loss, layout_density, snr_weights, stratified_timesteps
from floyd.diffusion.schedule import NoiseSchedule
from floyd.models.unet import UNet2DConditionModel
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
# Of the noise's error at the noisy end: full weight of the clean picture's error down to a log SNR of about -5.3.
# At 64 px things find their places around there and below; 1000 made the mean colour jitter in bfloat16.
MOST_WEIGHT = 200.0
LOOP = LoopConfig(
    phases=(
        Phase(num_steps=3400, batch_size=32, size=32, rate=1e-3, last_rate=1e-3),
        Phase(num_steps=2100, batch_size=20, size=64, rate=8e-4, last_rate=8e-4),
        Phase(num_steps=380, batch_size=20, size=64, rate=8e-4, last_rate=1e-5),
    ),
    optimizer="muon",
    weight_decay=0.01,
    seed=21,
)


def build_unet() -> UNet2DConditionModel:
    torch.manual_seed(LOOP.seed)
    unet = UNet2DConditionModel(**UNET)
    zero_residuals(unet)
    return unet


Embed = Callable[[list[str]], Tensor]  # captions -> [B, 77, E]


def denoising_loss(embed: Embed) -> Any:
    """The hybrid loss of stage I for `Trainer`."""
    schedule = NoiseSchedule.cosine()
    weight_T = snr_weights(schedule, most=MOST_WEIGHT)
    density_T = layout_density(schedule, low=-7.0, high=0.0, share=0.7)

    def loss_of(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
        device = device_of(model)
        scenes = scenes_at(LOOP.seed, step, phase.batch_size)
        clean_BCHW = pictures_of(scenes, phase.size).to(device)
        text_BLE = embed(texts_of(scenes, generator)).to(device)
        t_B = stratified_timesteps(density_T, phase.batch_size, generator).to(device)
        noise_BCHW = torch.randn(clean_BCHW.shape, generator=generator).to(device)
        out_BCHW = model(schedule.noised(clean_BCHW, noise_BCHW, t_B), t_B, text_BLE, return_dict=False)[0]
        simple_B, bound_B = hybrid_loss(out_BCHW, clean_BCHW, noise_BCHW, t_B, schedule, weight_T)
        return {"noise": simple_B.mean(), "variance": bound_B.mean()}

    return loss_of
