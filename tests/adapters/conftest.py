"""Tiny pipelines over networks of their own, and answers of those networks."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor

from floyd import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)

SCHEDULE: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "sample_max_value": 1.5,
}


def made(config: dict[str, Any], seed: int) -> UNet2DConditionModel:
    torch.manual_seed(7)
    network = tiny.disturbed(UNet2DConditionModel(**config), seed)
    with torch.no_grad():
        network.conv_out.weight *= 0.25
    return network


@pytest.fixture(scope="session")
def _networks() -> dict[str, Any]:
    return {
        "one": made(tiny.STAGE_ONE, 0),
        "two": made(tiny.STAGE_TWO, 1),
        "t5": tiny.t5(),
        "tokenizer": tiny.t5_tokenizer(),
        "three": made(tiny.UPSCALER, 2),
        "vae": tiny.disturbed(AutoencoderKL(**tiny.VAE), 2),
        "clip": tiny.clip_text(),
        "clip_tokenizer": tiny.clip_tokenizer(),
    }


@pytest.fixture
def networks(_networks: dict[str, Any]) -> dict[str, Any]:
    """Each test may change them."""
    return deepcopy(_networks)


@pytest.fixture
def pipe(networks: dict[str, Any]) -> IFPipeline:
    return stage_one(networks["one"], networks["t5"], networks["tokenizer"])


@pytest.fixture
def second(networks: dict[str, Any]) -> IFSuperResolutionPipeline:
    """Stage II, without a text encoder."""
    scheduler = DDPMScheduler(**SCHEDULE)
    pipe = IFSuperResolutionPipeline(
        None, None, networks["two"], scheduler, scheduler, None, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def third(networks: dict[str, Any]) -> StableDiffusionUpscalePipeline:
    betas: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}
    sampling = DDIMScheduler(
        **betas, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    parts = (networks[name] for name in ("vae", "clip", "clip_tokenizer", "three"))
    pipe = StableDiffusionUpscalePipeline(*parts, DDPMScheduler(**betas), sampling)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stage_one(unet: Any, text_encoder: Any = None, tokenizer: Any = None) -> IFPipeline:
    scheduler = DDPMScheduler(**SCHEDULE)
    pipe = IFPipeline(tokenizer, text_encoder, unet, scheduler, None, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def paint() -> Callable[..., Tensor]:
    """A call of two steps from given embeddings."""

    def call(pipe: Any, *, steps: int = 2, **options: Any) -> Tensor:
        positive, negative = tiny.embeds()
        told = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "num_inference_steps": steps}
        generator = torch.Generator().manual_seed(0)
        images: Tensor = pipe(generator=generator, output_type="pt", **{**told, **options}).images
        return images

    return call


@torch.no_grad()
def answer(unet: Any, seed: int = 5) -> Tensor:
    """What a UNet says to one input."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, unet.config.in_channels, 16, 16, generator=generator)
    text = torch.randn(1, tiny.TOKENS, tiny.ENCODER_WIDTH, generator=generator)
    labels = {} if unet.config.class_embed_type is None else {"class_labels": torch.tensor([100])}
    out: Tensor = unet(x, torch.tensor(400), text, return_dict=False, **labels)[0]
    return out


@torch.no_grad()
def reading(text_encoder: Any) -> Tensor:
    """What a text encoder makes of one text."""
    out: Tensor = text_encoder(torch.arange(4, 16)[None])[0]
    return out
