"""The built-in cascade from nothing: every part trained in turn, each resumable, then put together.

text ─► stage_1        stage I and II read the frozen text encoder
     └► stage_2
vae ──► stage_3        stage III paints the latents of the autoencoder

stage_1 ──► student    on demand: predicts in one branch what stage I predicts guided
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from floyd.apps.mini import stage_one, stage_three, stage_two, student, text
from floyd.apps.mini.checkpoint import unpack
from floyd.apps.mini.data import scenes_at
from floyd.apps.mini.tokenizer import train_tokenizer
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL
from floyd.store.files import made, read_json, write_json
from floyd.training.loop import LoopConfig, LossOf, Progress, Trainer

PARTS = ("text", "stage_1", "stage_2", "vae", "stage_3")
MORE_PARTS = ("student",)  # which no checkpoint needs
_NEEDS = {"stage_1": "text", "stage_2": "text", "stage_3": "vae", "student": "stage_1"}
_MADE = {"text": "text_encoder", "stage_1": "unet_1", "stage_2": "unet_2", "vae": "vae", "stage_3": "clip_text_encoder"}
_MADE |= {"student": "unet_student"}
NUM_CAPTIONS = 20_000  # that the tokenizers are made from
Steps = Generator[tuple[str, Progress], None, None]


@dataclass(frozen=True)
class Recipe:
    """Where the run lives, on which device, by how much to shorten it (for a trial), and what it starts from.

    With `start`, a cascade of the same architecture, its parts count as trained: those that `train` is told to train
    go on from its weights.
    """

    folder: Path
    device: str = "cpu"
    scale: float = 1.0
    start: Path | None = None

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
            if part not in PARTS + MORE_PARTS:
                raise ValueError(f"parts must be of {', '.join(PARTS + MORE_PARTS)}, got {part!r}.")
            need = _NEEDS.get(part)
            is_given = self.start is not None or self.is_finished(need or "text")
            if need is not None and need not in parts[:i] and not is_given:
                raise ValueError(f"{part} builds on {need}, which {self.folder} does not hold: train {need} before it.")
        self._keep_to_the_terms()
        if self.start is not None and not all(self.is_finished(part) for part in PARTS):
            unpack(self.start, self.folder)

    def _keep_to_the_terms(self) -> None:
        """A run is gone on with as it was begun, or not at all: mixed lengths would be neither."""
        path = self.folder / "terms.json"
        terms: dict[str, Any] = {"scale": self.scale}
        if self.start is not None:
            terms["start"] = str(self.start)
        if not path.is_file():
            write_json(made(self.folder) / path.name, terms)
        elif (begun := read_json(path)) != terms:
            raise ValueError(
                f"The run in {self.folder} was begun with {_said(begun)}, got {_said(terms)}: "
                "go on with that, or choose another folder."
            )

    def _trainer(self, part: str) -> Trainer:
        model, loss_of, config = _BUILD[part](self)
        if self.start is not None and part in PARTS:
            self._load(_trained_modules(part, model))
        return Trainer(model.to(self.device), loss_of, self._shortened(config), self.folder / f"run_{part}")

    def _shortened(self, config: LoopConfig) -> LoopConfig:
        phases = tuple(replace(p, num_steps=max(1, round(p.num_steps * self.scale))) for p in config.phases)
        return replace(config, phases=phases)

    def _load(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            module.load_state_dict(type(module).from_pretrained(self.folder / name).state_dict())  # type: ignore[attr-defined]

    def captions(self) -> list[str]:
        return [caption.text for _, caption in scenes_at(7, 0, NUM_CAPTIONS)]

    def embed(self) -> stage_one.Embed:
        """The frozen text encoder as stages I and II see it."""
        from transformers import T5EncoderModel, T5Tokenizer

        tokenizer = T5Tokenizer.from_pretrained(self.folder / "tokenizer")
        encoder = T5EncoderModel.from_pretrained(self.folder / "text_encoder").eval().to(self.device)
        return lambda texts: text.embedded(encoder, tokenizer, texts)

    def tokenizer(self) -> Any:
        from transformers import T5Tokenizer

        folder = self.folder / "tokenizer"
        if self.start is not None:
            return T5Tokenizer.from_pretrained(folder)
        return train_tokenizer(self.captions(), folder)

    def clip_tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        folder = self.folder / "clip_tokenizer"
        if self.start is not None:
            return CLIPTokenizer.from_pretrained(folder)
        return stage_three.train_clip_tokenizer(self.captions(), folder)

    def vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self.folder / "vae").to(self.device)


Build = Callable[[Recipe], tuple[nn.Module, LossOf, LoopConfig]]


def _build_text(recipe: Recipe) -> tuple[nn.Module, LossOf, LoopConfig]:
    tokenizer = recipe.tokenizer()
    return text.Reader(text.build_encoder(len(tokenizer))), text.reading_loss(tokenizer), text.LOOP


def _build_stage_1(recipe: Recipe) -> tuple[nn.Module, LossOf, LoopConfig]:
    return stage_one.Apprentice(stage_one.build_unet()), stage_one.denoising_loss(recipe.embed()), stage_one.LOOP


def _build_stage_2(recipe: Recipe) -> tuple[nn.Module, LossOf, LoopConfig]:
    return stage_two.build_unet(), stage_two.enlarging_loss(recipe.embed()), stage_two.LOOP


def _build_student(recipe: Recipe) -> tuple[nn.Module, LossOf, LoopConfig]:
    one, teacher = (UNet2DConditionModel.from_pretrained(recipe.folder / "unet_1") for _ in range(2))
    return one, student.imitation_loss(teacher.eval().to(recipe.device), recipe.embed()), student.LOOP


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


def _finish_stage_1(recipe: Recipe, model: Any) -> None:
    model.cpu().unet.save_pretrained(recipe.folder / "unet_1")


def _finish_student(recipe: Recipe, model: Any) -> None:
    model.cpu().save_pretrained(recipe.folder / "unet_student")


def _finish_stage_2(recipe: Recipe, model: Any) -> None:
    model.cpu().save_pretrained(recipe.folder / "unet_2")


def _finish_stage_3(recipe: Recipe, model: Any) -> None:
    model.cpu().unet.save_pretrained(recipe.folder / "unet_3")
    model.text_encoder.save_pretrained(recipe.folder / "clip_text_encoder")


def _trained_modules(part: str, model: Any) -> dict[str, nn.Module]:
    """What of a part's model ends up in the checkpoint, by the folder's name."""
    if part == "text":
        return {"text_encoder": model.encoder}
    if part == "stage_3":
        return {"unet_3": model.unet, "clip_text_encoder": model.text_encoder}
    return {_MADE[part]: model.unet if part == "stage_1" else model}


def _said(terms: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in terms.items())


_BUILD: dict[str, Build] = {
    "text": _build_text,
    "stage_1": _build_stage_1,
    "stage_2": _build_stage_2,
    "vae": _build_vae,
    "stage_3": _build_stage_3,
    "student": _build_student,
}
_FINISH: dict[str, Callable[[Recipe, Any], None]] = {
    "text": _finish_text,
    "stage_1": _finish_stage_1,
    "stage_2": _finish_stage_2,
    "vae": _finish_vae,
    "stage_3": _finish_stage_3,
    "student": _finish_student,
}
