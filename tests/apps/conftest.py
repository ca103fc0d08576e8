"""A tiny cascade with random weights, on disk: 48, 96 and 384 pixels. The judge of the scenes reads no less than 48."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.hub_stub import Hub, serving

from floyd import DDIMScheduler, DDPMScheduler
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL
from floyd.pipelines.cascade import Cascade
from floyd.pipelines.deepfloyd_if import IFPipeline, IFSuperResolutionPipeline
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline

SIDES = (48, 96, 384)
PRESETS = {
    "stage_1": {"num_inference_steps": 3, "guidance_scale": 2.0},
    "stage_2": {"num_inference_steps": 2, "guidance_scale": 1.0, "noise_level": 50},
    "stage_3": {"num_inference_steps": 2, "guidance_scale": 1.0},
}
_COSINE = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "prediction_type": "epsilon"}
_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}
_NO_SAFETY: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "watermarker": None}


def _unet(config: dict[str, Any], seed: int, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    return tiny.disturbed(UNet2DConditionModel(**{**config, **overrides}), seed)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a tiny cascade lies."""
    first = IFPipeline(
        **tiny.text_modules(),
        unet=_unet(tiny.STAGE_ONE, 0, sample_size=SIDES[0]),
        scheduler=DDPMScheduler(**_COSINE),
        **_NO_SAFETY,
        requires_safety_checker=False,
    )
    second = IFSuperResolutionPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=_unet(tiny.STAGE_TWO, 1, sample_size=SIDES[1]),
        scheduler=DDPMScheduler(**_COSINE),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **_NO_SAFETY,
        requires_safety_checker=False,
    )
    torch.manual_seed(2)
    third = StableDiffusionUpscalePipeline(
        vae=tiny.disturbed(AutoencoderKL(**tiny.VAE), 2),
        text_encoder=tiny.clip_text(),
        tokenizer=tiny.clip_tokenizer(),
        unet=_unet(tiny.UPSCALER, 2),
        low_res_scheduler=DDPMScheduler(**_LINEAR),
        scheduler=DDIMScheduler(
            **_LINEAR, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
    )
    folder = tmp_path_factory.mktemp("tiny") / "cascade"
    Cascade(first, second, third, presets=PRESETS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cascade(folder: Path) -> Cascade:
    return Cascade.from_pretrained(folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """On localhost, with nothing in it."""
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub
