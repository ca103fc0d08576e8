"""A student of stage I that predicts in one branch what its teacher predicts guided.

Distillation of guided diffusion models (arXiv:2210.03142), section 3.1, for one scale of guidance. The student begins
as a copy of the teacher; what it is to learn is small.

B images  C channels  H height  W width  E encoder width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from floyd.apps.mini import stage_one
from floyd.apps.mini.checkpoint import SAMPLING
from floyd.apps.mini.data import pictures_of, scenes_at, texts_of
from floyd.diffusion.conditioning import Conditioning
from floyd.diffusion.guidance import Guidance, Predict
from floyd.diffusion.losses import layout_density, snr_weights, stratified_timesteps
from floyd.diffusion.schedule import NoiseSchedule
from floyd.models.unet import UNet2DConditionModel
from floyd.training.loop import LoopConfig, Losses, Phase, device_of

SCALE: float = SAMPLING["stage_1"]["guidance_scale"]
LOOP = LoopConfig(
    phases=(Phase(num_steps=500, batch_size=24, size=64, rate=4e-4, last_rate=1e-5),),
    warmup_steps=20,
    optimizer="muon",
    weight_decay=0.0,
    ema_decay=0.99,
    seed=53,
)


def imitation_loss(teacher: UNet2DConditionModel, embed: stage_one.Embed, *, scale: float = SCALE) -> Any:
    """For `Trainer`: how far the student's noise is from the teacher's guided one, and its variance from the teacher's.

    The error of the noise is weighed as in the teacher's own training.
    """
    schedule = NoiseSchedule.cosine()
    weight_T = snr_weights(schedule, high=stage_one.FINISH_SNR, most=stage_one.MOST_WEIGHT)
    density_T = layout_density(schedule, low=-8.0, high=0.0, share=0.35)

    def loss_of(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
        device = device_of(model)
        scenes = scenes_at(LOOP.seed, step, phase.batch_size)
        clean_BCHW = pictures_of(scenes, phase.size).to(device)
        text_BLE = embed(texts_of(scenes, generator)).to(device)
        empty_BLE = embed([""] * len(scenes)).to(device)
        t_B = stratified_timesteps(density_T, phase.batch_size, generator).to(device)
        noise_BCHW = torch.randn(clean_BCHW.shape, generator=generator).to(device)
        noisy_BCHW = schedule.noised(clean_BCHW, noise_BCHW, t_B)

        with torch.no_grad():
            empty, text = Conditioning(empty_BLE), Conditioning(text_BLE)
            wanted = _predictor(teacher, Guidance.classifier_free(text, empty, scale), t_B)(noisy_BCHW, 0)
        got = _predictor(model, Guidance(Conditioning(text_BLE)), t_B)(noisy_BCHW, 0)
        assert got.variance_BCHW is not None
        assert wanted.variance_BCHW is not None
        error_B = (got.target_BCHW - wanted.target_BCHW).square().flatten(1).mean(1)
        return {
            "noise": (weight_T.to(device)[t_B] * error_B).mean(),
            "variance": (got.variance_BCHW - wanted.variance_BCHW).square().mean(),
        }

    return loss_of


def _predictor(unet: Callable[..., Any], guidance: Guidance, t_B: Tensor) -> Predict:
    """Of a network that is told a timestep for each image, and no other."""

    def network(x_KCHW: Tensor, _: int, told: Conditioning) -> Tensor:
        out: Tensor = unet(x_KCHW, t_B.repeat(guidance.num_branches), told.text_BLD, return_dict=False)[0]
        return out

    return guidance.predictor(network)
