"""The built-in cascade as files: a run's parts put together in the ordinary layout, and taken apart again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from floyd.apps.mini import stage_one, stage_three
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL
from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.deepfloyd_if import IFPipeline, IFSuperResolutionPipeline
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
from floyd.schedulers.ddim import DDIMScheduler
from floyd.schedulers.ddpm import DDPMScheduler

SAMPLING: dict[str, dict[str, Any]] = {  # how the built-in cascade is sampled unless told otherwise
    "stage_1": {"timesteps": "smart27", "guidance_scale": 1.5},
    "stage_2": {"num_inference_steps": 12, "guidance_scale": 1.0, "noise_level": 20, "color_fix": True},
    "stage_3": {"num_inference_steps": 8, "guidance_scale": 1.0, "noise_level": 0, "color_fix": True},
}

# Of stage II: the variance that it learns is too large at a few steps, which is seen as grain; the posterior's is not.
SMOOTH: dict[str, Any] = {"sample_max_value": 1.0, "variance_type": "fixed_small"}


def unpack(checkpoint: Path, run: Path) -> None:
    """The reverse of `assemble`: a cascade's parts where a run keeps them, in float32."""
    one, two, three = (DiffusionPipeline.from_pretrained(checkpoint / f"stage_{number}") for number in (1, 2, 3))
    for name, component in (
        ("text_encoder", one.components["text_encoder"]),
        ("unet_1", one.components["unet"]),
        ("unet_2", two.components["unet"]),
        ("vae", three.components["vae"]),
        ("unet_3", three.components["unet"]),
        ("clip_text_encoder", three.components["text_encoder"]),
    ):
        component.save_pretrained(run / name)
    for source, target in (("stage_1", "tokenizer"), ("stage_3", "clip_tokenizer")):
        shutil.copytree(checkpoint / source / "tokenizer", run / target, dirs_exist_ok=True)


def assemble(run: Path, out: Path) -> None:
    """The trained parts as three pipelines in the ordinary checkpoint layout, weights in float16."""
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    def half(model: Any) -> Any:
        return model.to(torch.float16)

    no_checker: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "watermarker": None}
    IFPipeline(
        tokenizer=T5Tokenizer.from_pretrained(run / "tokenizer"),
        text_encoder=half(T5EncoderModel.from_pretrained(run / "text_encoder")),
        unet=half(UNet2DConditionModel.from_pretrained(run / "unet_1")),
        scheduler=DDPMScheduler(**stage_one.SCHEDULER),
        **no_checker,
        requires_safety_checker=False,
    ).save_pretrained(out / "stage_1")
    IFSuperResolutionPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=half(UNet2DConditionModel.from_pretrained(run / "unet_2")),
        scheduler=DDPMScheduler(**{**stage_one.SCHEDULER, **SMOOTH}),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **no_checker,
        requires_safety_checker=False,
    ).save_pretrained(out / "stage_2")
    StableDiffusionUpscalePipeline(
        vae=half(AutoencoderKL.from_pretrained(run / "vae")),
        text_encoder=half(CLIPTextModel.from_pretrained(run / "clip_text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(run / "clip_tokenizer"),
        unet=half(UNet2DConditionModel.from_pretrained(run / "unet_3")),
        low_res_scheduler=DDPMScheduler(**stage_three.LOW_RES_SCHEDULER),
        scheduler=DDIMScheduler(**stage_three.SCHEDULER),
    ).save_pretrained(out / "stage_3")
    for source, target in (("tokenizer", "stage_1"), ("clip_tokenizer", "stage_3")):
        shutil.rmtree(out / target / "tokenizer")
        shutil.copytree(run / source, out / target / "tokenizer")
    (out / "floyd.json").write_text(json.dumps(SAMPLING, indent=2) + "\n")
