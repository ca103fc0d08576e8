"""The built-in cascade from nothing: every part trained in turn, each resumable, then put together.

text ─► stage_1        stage I and II read the frozen text encoder
     └► stage_2
vae ──► stage_3        stage III paints the latents of the autoencoder
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from floyd.apps.mini import stage_one, stage_three, stage_two, text
from floyd.apps.mini.data import scenes_at
from floyd.apps.mini.tokenizer import train_tokenizer
from floyd.models.vae import AutoencoderKL
from floyd.store.files import made, read_json, write_json
from floyd.training.loop import LoopConfig, LossOf, Progress, Trainer

PARTS = ("text", "stage_1", "stage_2", "vae", "stage_3")
_NEEDS = {"stage_1": "text", "stage_2": "text", "stage_3": "vae"}
_MADE = {"text": "text_encoder", "stage_1": "unet_1", "stage_2": "unet_2", "vae": "vae", "stage_3": "clip_text_encoder"}
NUM_CAPTIONS = 20_000  # that the tokenizers are made from
SAMPLING: dict[str, dict[str, Any]] = {  # how the built-in cascade is sampled unless told otherwise
    "stage_1": {"timesteps": "smart27", "guidance_scale": 4.0},
    "stage_2": {"timesteps": "smart27", "guidance_scale": 1.0, "noise_level": 100},
    "stage_3": {"num_inference_steps": 12, "guidance_scale": 1.0, "noise_level": 20},
}

Steps = Generator[tuple[str, Progress], None, None]


@dataclass(frozen=True)
class Recipe:
    """Where the run lives, on which device, and by how much to shorten it (for a trial)."""

    folder: Path
    device: str = "cpu"
    scale: float = 1.0

    def train(self, parts: tuple[str, ...] = PARTS) -> Steps:
        """Trains the parts in order, yielding after every step; what is finished already is skipped.

        Closing the iterator saves where it was, and calling `train` again goes on from there. Checked before it starts.
        """
        self.check(parts)
        return self._steps(parts)

    def _steps(self, parts: tuple[str, ...]) -> Steps:
        for part in parts:
            trainer = self._trainer(part)
            with closing(trainer.run()) as steps:
                for progress in steps:
                    yield part, progress
            trainer.ema.copy_to(trainer.model)
            _FINISH[part](self, trainer.model.eval())

    def is_finished(self, part: str) -> bool:
        """Whether the part's weights are there, to be built upon."""
        return (self.folder / _MADE[part] / "config.json").is_file()

    def check(self, parts: tuple[str, ...]) -> None:
        """Refuse, before anything is trained, what cannot be."""
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}.")
        for i, part in enumerate(parts):
            if part not in PARTS:
                raise ValueError(f"parts must be of {', '.join(PARTS)}, got {part!r}.")
            need = _NEEDS.get(part)
            if need is not None and need not in parts[:i] and not self.is_finished(need):
                raise ValueError(f"{part} builds on {need}, which {self.folder} does not hold: train {need} before it.")
        self._keep_to_the_terms()

    def _keep_to_the_terms(self) -> None:
        """A run is gone on with as it was begun, or not at all: mixed lengths would be neither."""
        path = self.folder / "terms.json"
        terms = {"scale": self.scale}
        if not path.is_file():
            write_json(made(self.folder) / path.name, terms)
        elif (begun := read_json(path)) != terms:
            raise ValueError(
                f"The run in {self.folder} was begun with scale {begun.get('scale')}, got {self.scale}: "
                "go on with that, or choose another folder."
            )

    def _trainer(self, part: str) -> Trainer:
        model, loss_of, config = _BUILD[part](self)
        return Trainer(model.to(self.device), loss_of, self._shortened(config), self.folder / f"run_{part}")

    def _shortened(self, config: LoopConfig) -> LoopConfig:
        phases = tuple(replace(p, num_steps=max(1, round(p.num_steps * self.scale))) for p in config.phases)
        return replace(config, phases=phases)

    def captions(self) -> list[str]:
        return [caption.text for _, caption in scenes_at(7, 0, NUM_CAPTIONS)]

    def embed(self) -> stage_one.Embed:
        """The frozen text encoder as stages I and II see it."""
        from transformers import T5EncoderModel, T5Tokenizer

        tokenizer = T5Tokenizer.from_pretrained(self.folder / "tokenizer")
        encoder = T5EncoderModel.from_pretrained(self.folder / "text_encoder").eval().to(self.device)
        return lambda texts: text.embedded(encoder, tokenizer, texts)

    def tokenizer(self) -> Any:
        return train_tokenizer(self.captions(), self.folder / "tokenizer")

    def clip_tokenizer(self) -> Any:
        return stage_three.train_clip_tokenizer(self.captions(), self.folder / "clip_tokenizer")

    def vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self.folder / "vae").to(self.device)


Build = Callable[[Recipe], tuple[nn.Module, LossOf, LoopConfig]]


def _build_text(recipe: Recipe) -> tuple[nn.Module, LossOf, LoopConfig]:
    tokenizer = recipe.tokenizer()
    return text.Reader(text.build_encoder(len(tokenizer))), text.reading_loss(tokenizer), text.LOOP


def _build_stage_1(recipe: Recipe) -> tuple[nn.Module, LossOf, LoopConfig]:
    return stage_one.build_unet(), stage_one.denoising_loss(recipe.embed()), stage_one.LOOP


def _build_stage_2(recipe: Recipe) -> tuple[nn.Module, LossOf, LoopConfig]:
    return stage_two.build_unet(), stage_two.enlarging_loss(recipe.embed()), stage_two.LOOP


def _build_vae(recipe: Recipe) -> tuple[nn.Module, LossOf, LoopConfig]:
    return stage_three.build_vae(), stage_three.holding_loss(), stage_three.VAE_LOOP


def _build_stage_3(recipe: Recipe) -> tuple[nn.Module, LossOf, LoopConfig]:
    tokenizer = recipe.clip_tokenizer()
    loss_of = stage_three.upscaling_loss(recipe.vae(), tokenizer)
    return stage_three.Upscaler(tokenizer), loss_of, stage_three.LOOP


def _finish_text(recipe: Recipe, model: Any) -> None:
    model.encoder.cpu().save_pretrained(recipe.folder / "text_encoder")


def _finish_vae(recipe: Recipe, model: Any) -> None:
    stage_three.normalize_latents(model.cpu())
    model.save_pretrained(recipe.folder / "vae")


def _finish_unet(name: str) -> Callable[[Recipe, Any], None]:
    return lambda recipe, model: model.cpu().save_pretrained(recipe.folder / name)


def _finish_stage_3(recipe: Recipe, model: Any) -> None:
    model.cpu().unet.save_pretrained(recipe.folder / "unet_3")
    model.text_encoder.save_pretrained(recipe.folder / "clip_text_encoder")


_BUILD: dict[str, Build] = {
    "text": _build_text,
    "stage_1": _build_stage_1,
    "stage_2": _build_stage_2,
    "vae": _build_vae,
    "stage_3": _build_stage_3,
}
_FINISH: dict[str, Callable[[Recipe, Any], None]] = {
    "text": _finish_text,
    "stage_1": _finish_unet("unet_1"),
    "stage_2": _finish_unet("unet_2"),
    "vae": _finish_vae,
    "stage_3": _finish_stage_3,
}


def assemble(run: Path, out: Path) -> None:
    """The trained parts as three pipelines in the ordinary checkpoint layout, weights in float16."""
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    from floyd.models.unet import UNet2DConditionModel
    from floyd.pipelines.deepfloyd_if import IFPipeline, IFSuperResolutionPipeline
    from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
    from floyd.schedulers import DDIMScheduler, DDPMScheduler

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
        scheduler=DDPMScheduler(**{**stage_one.SCHEDULER, "sample_max_value": 1.0}),
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
