"""The whole way to 1024 px with networks of the published sizes, for bench_gpu.py: three stages of either side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
from gpu_networks import Bench
from pairs import BUILT_IN

import floyd
from floyd.models.costs import decoder_cost, unet_cost
from floyd.runtime.switches import Switches

STEPS = {"full": (50, 50, 75), "tiny": (2, 1, 1)}
MIDDLE = {"full": 256, "tiny": 64}  # pixels of stage II
KEYS: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "safety_checker": None, "feature_extractor": None}
LAST = {key: value for key, value in KEYS.items() if key != "feature_extractor"}


def picture(bench: Bench) -> tuple[dict[str, Callable[[], Callable[[], Any]]], float]:
    """What paints it, and its arithmetic."""
    pairs = [bench.unets(name) for name in ("IF-I-XL", "IF-II-L", "x4-upscaler")]
    size = "tiny" if bench.is_tiny else "full"
    vaes, steps, middle = bench.vaes(), STEPS[size], MIDDLE[size]
    best = Switches.best_for(bench.device)
    ways: dict[str, Switches] = {"floyd": best}
    if bench.device.type == "cuda":
        ways["floyd graphs"] = replace(best, graphs=True)
    ways["floyd compiled"] = best.when_compiled(bench.device)

    def ours(switches: Switches) -> Callable[[], Any]:
        stages = _stages(floyd, [network for _, network in pairs], vaes[1])
        for stage in stages:
            stage.switches = switches
        return _painting(bench, stages, steps, middle)

    works: dict[str, Callable[[], Callable[[], Any]]] = {
        "diffusers": lambda: _painting(
            bench, _stages(diffusers, [theirs for theirs, _ in pairs], vaes[0]), steps, middle
        )
    }
    works |= {name: lambda switches=switches: ours(switches) for name, switches in ways.items()}
    sides = (pairs[0][1].config.sample_size, middle, middle)  # a latent for each pixel of stage II
    costs = [unet_cost(network.config, side, side) for (_, network), side in zip(pairs, sides, strict=True)]
    flops = sum(2 * count * cost.flops for count, cost in zip(steps, costs, strict=True))
    return works, flops + decoder_cost(vaes[1].config, sides[2], sides[2]).flops


def _stages(library: Any, unets: list[Any], vae: Any) -> list[Any]:
    def scheduler(kind: str, stage: int, subfolder: str = "scheduler") -> Any:
        return getattr(library, kind).from_pretrained(BUILT_IN[f"mini-{stage}"], subfolder=subfolder)

    noising = {"image_noising_scheduler": scheduler("DDPMScheduler", 2, "image_noising_scheduler")}
    own = {**KEYS, "watermarker": None, "requires_safety_checker": False}
    low_res = {"low_res_scheduler": scheduler("DDPMScheduler", 3, "low_res_scheduler")}
    stages = [
        library.IFPipeline(unet=unets[0], scheduler=scheduler("DDPMScheduler", 1), **own),
        library.IFSuperResolutionPipeline(unet=unets[1], scheduler=scheduler("DDPMScheduler", 2), **noising, **own),
        library.StableDiffusionUpscalePipeline(
            unet=unets[2], vae=vae, scheduler=scheduler("DDIMScheduler", 3), **low_res, **LAST
        ),
    ]
    for stage in stages:
        stage.set_progress_bar_config(disable=True)
    return stages


def _painting(bench: Bench, stages: list[Any], steps: tuple[int, ...], middle: int) -> Callable[[], Any]:
    """Prompt embeddings are given: reading the prompt is a row of its own."""
    widths = [stage.unet.config.encoder_hid_dim or stage.unet.config.cross_attention_dim for stage in stages]
    texts = [
        {
            "prompt_embeds": bench.normal(1, 77, width),
            "negative_prompt_embeds": torch.zeros(1, 77, width, device=bench.device, dtype=bench.dtype),
        }
        for width in widths
    ]

    def paint() -> Any:
        generator = torch.Generator(bench.device).manual_seed(0)
        told = [
            {**text, "num_inference_steps": count, "guidance_scale": 4.0, "generator": generator}
            for text, count in zip(texts, steps, strict=True)
        ]
        x_BCHW = stages[0](**told[0], output_type="pt").images
        sized = {"height": middle, "width": middle, "output_type": "pt", "noise_level": 100}
        x_BCHW = stages[1](image=x_BCHW.clamp(-1, 1), **sized, **told[1]).images
        return stages[2](image=x_BCHW.clamp(-1, 1), noise_level=20, **told[2], output_type="np").images

    return paint
