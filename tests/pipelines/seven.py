"""The six pipelines of IF and the upscaler, called alike: what holds of one must hold of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

import floyd.pipelines.deepfloyd_if as family
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline

STAGE_OF = {
    "IFPipeline": "one",
    "IFImg2ImgPipeline": "one",
    "IFInpaintingPipeline": "one",
    "IFSuperResolutionPipeline": "two",
    "IFImg2ImgSuperResolutionPipeline": "two",
    "IFInpaintingSuperResolutionPipeline": "two",
    "StableDiffusionUpscalePipeline": "three",
}
SEVEN = tuple(STAGE_OF)
PROMPTS = ("a red circle", "the small blue square above a cat", "a dog")
SEEDS = (11, 12, 13)


def built(name: str, ours: dict[str, Any], **components: Any) -> Any:
    """The named pipeline over shared components; those of stage II read with the T5 of stage I."""
    parts = ours[STAGE_OF[name]].components
    if STAGE_OF[name] == "two":
        parts |= {part: getattr(ours["one"], part) for part in ("tokenizer", "text_encoder")}
    cls: Any = StableDiffusionUpscalePipeline if STAGE_OF[name] == "three" else getattr(family, name)
    pipe = cls(**{**parts, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def told(name: str, *images: int, device: str = "cpu") -> dict[str, Any]:
    """What makes so many images, each with a prompt, a seed and pictures of its own; quick to paint."""
    arguments: dict[str, Any] = {
        "prompt": [PROMPTS[i] for i in images],
        "generator": [Generator().manual_seed(SEEDS[i]) for i in images],
        "num_inference_steps": 3,
        "output_type": "pt",
    }
    stage = STAGE_OF[name]
    side = {"one": 32, "two": 48, "three": 0}[stage]
    if "Img2Img" in name or "Inpainting" in name:
        key = "image" if stage == "one" else "original_image"
        arguments |= {key: _pictures(images, side).to(device), "strength": 0.7}
    if "Inpainting" in name:
        arguments["mask_image"] = (_pictures(range(1), side)[0, 0] > 0).float()
    if stage != "one":
        arguments |= {"image": _pictures(images, 32).to(device), "noise_level": 100}
    return arguments


def _pictures(images: Sequence[int], side: int) -> Tensor:
    """In [-1, 1]."""
    return torch.stack([torch.rand(3, side, side, generator=Generator().manual_seed(i)) * 2 - 1 for i in images])
