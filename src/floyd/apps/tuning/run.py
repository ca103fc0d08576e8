"""A run of fine-tuning from its configuration to its file.

pictures checked ─► class pictures painted ─► captions read, T5 let go ─► the stage trained ─► what it learned written
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from floyd.adapters.tokens import read_rows, write_rows
from floyd.apps.tuning.config import TuneConfig
from floyd.apps.tuning.keeping import painted
from floyd.apps.tuning.looking import Board, Validation, at_rest, cleaned, save_pictures
from floyd.apps.tuning.models import Models
from floyd.pipelines.base import device_of_map
from floyd.runtime.placement import device_of
from floyd.store.files import made, read_json, write_json
from floyd.text.prompts import embed
from floyd.training.data.pictures import Pictures
from floyd.training.denoising import Batches, Denoising, Enlarging, Kept, ReadText, Weighing, known
from floyd.training.embeddings import Embeddings
from floyd.training.inversion import Inverting
from floyd.training.loop import LoopConfig, Phase, Progress, Trainer
from floyd.training.lora import attach, save, without
from floyd.training.recompute import recompute
from floyd.training.workers import Workers, launched, main_first

UNET = "unet"  # the folder of a network all of whose weights were trained


@dataclass(frozen=True)
class Moment:
    """How far a run is: `done` of `total` of what `label` says."""

    label: str  # class pictures, captions, training
    done: int
    total: int
    losses: dict[str, float] = field(default_factory=dict)
    seconds_left: float | None = None
    pictures: tuple[Path, ...] = ()  # of the validation, if it was just painted


Moments = Generator[Moment, None, None]


def tune(config: TuneConfig, on_moment: Callable[[Moment], None] | None = None) -> Path:
    """The whole run, from where it was stopped if it was; what it wrote is returned."""
    run = Run(config)
    for moment in run.moments():
        if on_moment is not None:
            on_moment(moment)
    return run.result


class Run:
    """One run, in the folder `config.out`."""

    def __init__(self, config: TuneConfig, workers: Workers | None = None) -> None:
        """Checks all that can be checked before anything is loaded; the pictures are decoded here."""
        self.config = config
        self.workers = launched(on_cpu=config.device == "cpu") if workers is None else workers
        self.device = self.workers.device or device_of_map(config.device)
        self.folder = Path(config.out).expanduser()
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        self.models = Models.of(
            config.model, stage=config.stage, dtype=dtype, variant=config.variant, words=config.words
        )
        if config.validate_every:
            self.models.stages_for(self._validation_size)
        self.pictures = self._pictures(config.data, config.caption)
        words = () if config.words is None else tuple(read_rows(config.words))
        self._check_tokens(config.tokens or words)
        self._keep_to_the_terms()
        self.board = Board(self.folder / "tensorboard") if config.tensorboard and self.workers.is_main else None

    @property
    def result(self) -> Path:
        """The file, or the folder, that the run writes in the end."""
        from floyd.adapters import tokens
        from floyd.training import lora

        if self._is_lora:
            return self.folder / lora.FILE_NAME
        return self.folder / (tokens.FILE_NAME if self.config.method == "textual-inversion" else UNET)

    def moments(self) -> Moments:
        """Closing the iterator saves where it was; a `Run` of the same configuration goes on from there."""
        kept = yield from self._kept()
        is_inverting = self.config.method == "textual-inversion"
        read: Any = None if is_inverting else (yield from self._reading(kept))
        pipe = self.models.pipeline(is_trained_whole=not self._is_lora and not is_inverting)
        pipe.unet.to(self.device)
        if self.config.checkpointing:
            recompute(pipe.unet)
        model, write = self._model(pipe)
        read = model.read if is_inverting else read
        trainer = Trainer(
            model.train(), self._loss(pipe, kept, read), self._loop(pipe), self.folder / "run", workers=self.workers
        )
        validation = self._validation(pipe, read)
        with closing(trainer.run()) as steps:
            for progress in steps:
                yield self._moment(progress, trainer, validation)
        trainer.ema.copy_to(model)
        if self.workers.is_main:
            write()
        self.workers.wait()
        if self.board is not None:
            self.board.close()

    # -------------------------------------------------------------------------------------------------------- checking

    @property
    def _is_lora(self) -> bool:
        return self.config.method == "lora" or (self.config.method == "dreambooth" and not self.config.train_all)

    @property
    def _validation_size(self) -> int:
        return self.config.validation_size or self.models.sides()[self.config.stage - 1]

    def _pictures(self, data: str, caption: str | None) -> Pictures:
        config = self.config
        return Pictures.of(data, caption=caption, clean_caption=config.clean_caption, on_bad=config.on_bad)

    def _check_tokens(self, tokens: Sequence[str]) -> None:
        for token in tokens:
            if not any(token in caption.split() for caption in self.pictures.captions):
                raise ValueError(
                    f"None of the {len(self.pictures)} captions contains the token {token!r}, so nothing could be "
                    f"learned for it. The first caption is {self.pictures.captions[0]!r}."
                )

    def _keep_to_the_terms(self) -> None:
        """A run is gone on with as it was begun, or not at all."""
        path = self.folder / "terms.json"
        said = "\n".join(
            f"{item.name}\t{text}" for item, text in zip(self.pictures.items, self.pictures.captions, strict=True)
        )
        terms = json.loads(json.dumps({**self.config.terms(), "pictures": sha256(said.encode()).hexdigest()[:16]}))
        with main_first(self.workers):
            if not path.is_file():
                write_json(made(self.folder) / path.name, terms)
        begun = read_json(path)
        if begun != terms:
            changed = sorted(name for name in begun.keys() | terms.keys() if begun.get(name) != terms.get(name))
            said = ", ".join(f"{name} was {begun.get(name)!r} and is {terms.get(name)!r}" for name in changed)
            raise ValueError(
                f"The run in {self.folder} was begun otherwise: {said}. Go on as it was, or choose another out."
            )

    # ------------------------------------------------------------------------------------------------------ the parts

    def _kept(self) -> Generator[Moment, None, Kept | None]:
        """The pictures of what is to be kept, which are painted if they were not given."""
        config = self.config
        if config.method != "dreambooth":
            return None
        data = config.class_data
        if data is None:
            folder, done = self.folder / "class", 0
            with main_first(self.workers):
                seed = config.seed * 1_000_003
                parts = painted(self.models, config.class_prompt, config.class_pictures, folder, seed, str(self.device))
                for count in parts:
                    done += count
                    yield Moment("class pictures", done, max(config.class_pictures, done))
            data = str(folder)
        pictures = self._pictures(data, None)
        return Kept(pictures=pictures, weight=config.prior_weight, caption_dropout=config.class_dropout)

    def _reading(self, kept: Kept | None) -> Generator[Moment, None, ReadText]:
        """How captions and prompts become text states: T5 reads them now, and is let go."""
        config = self.config
        prompts = cleaned(config.validation_prompt, clean_caption=config.clean_caption)
        texts = ["", *prompts, *self.pictures.captions, *(kept.pictures.captions if kept else ())]
        folder, name = self.folder / "text", self.models.encoder_name()
        with main_first(self.workers):
            cache = Embeddings(folder, name)
            if missing := len(cache.missing(texts)):
                tokenizer, encoder = self.models.reader()
                encoder.to(self.device)
                read = partial(embed, tokenizer=tokenizer, text_encoder=encoder, device=self.device)
                done = 0
                for count in cache.read(texts, read):
                    done += count
                    yield Moment("captions", done, missing)
                del tokenizer, encoder, read
        return known(cache)

    def _model(self, pipe: Any) -> tuple[Any, Callable[[], Any]]:
        """What is trained, and how it is written in the end. Through T5, too, where words are learned."""
        config = self.config
        if config.method == "textual-inversion":
            words = Inverting(pipe.unet, *self.models.reader(), config.tokens, start=config.start_word).to(self.device)
            return words, lambda: write_rows(words.rows(), self.folder)
        if self._is_lora:
            attach(pipe.unet, rank=config.rank, alpha=config.alpha, targets=config.targets, seed=config.seed)
            return pipe.unet, lambda: save(pipe.unet, self.folder)
        return pipe.unet, lambda: pipe.unet.save_pretrained(self.folder / UNET)

    def _loss(self, pipe: Any, kept: Kept | None, read: Any) -> Denoising:
        config = self.config
        if (kind := pipe.scheduler.config.prediction_type) != "epsilon":
            raise ValueError(f"floyd trains networks that predict the noise (epsilon), and this one predicts {kind}.")
        enlarging = None
        if config.stage == 2:
            schedule = pipe.image_noising_scheduler.schedule
            enlarging = Enlarging(
                schedule=schedule, small_side=self.models.small_side(), max_level=config.max_noise_level
            )
        batches = Batches(
            pictures=self.pictures,
            crop=config.crop,
            flip=config.flip,
            caption_dropout=config.caption_dropout,
            kept=kept,
            seed=config.seed,
            small_side=None if enlarging is None else enlarging.small_side,
        )
        return Denoising(
            schedule=pipe.scheduler.schedule,
            batches=batches,
            read=read,
            enlarging=enlarging,
            weighing=Weighing(snr_gamma=config.snr_gamma, snr_floor=config.snr_floor, noisy_share=config.noisy_share),
            dtype=pipe.unet.dtype,
            before=without if config.prior == "network" else None,
        )

    def _loop(self, pipe: Any) -> LoopConfig:
        config = self.config
        phase = Phase(
            num_steps=config.steps,
            batch_size=config.batch,
            size=int(pipe.unet.config.sample_size),
            rate=config.rate,
            last_rate=config.rate * config.last_rate,
        )
        return LoopConfig(
            phases=(phase,),
            warmup_steps=config.warmup,
            optimizer=config.optimizer,
            accumulate=config.accumulate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            ema_decay=config.ema,
            precision=config.precision,
            snapshot_every_s=config.snapshot_every_s,
            seed=config.seed,
        )

    # -------------------------------------------------------------------------------------------------------- telling

    def _validation(self, pipe: Any, read: Any) -> Validation | None:
        config = self.config
        if not config.validate_every or not self.workers.is_main:
            return None

        def read_prompts(texts: Sequence[str]) -> Tensor:
            states: Tensor = read(cleaned(texts, clean_caption=config.clean_caption), device_of(pipe.unet))
            return states

        return Validation(self.models, pipe, config.validation_prompt, self._validation_size, config.seed, read_prompts)

    def _moment(self, progress: Progress, trainer: Trainer, validation: Validation | None) -> Moment:
        done = progress.step + 1
        if self.board is not None:
            self.board.losses(done, progress.losses)
        paths: list[Path] = []
        is_due = self.config.validate_every and done % self.config.validate_every == 0
        if validation is not None and is_due:
            with trainer.ema.applied(trainer.model), at_rest(trainer.model):
                pictures = validation.paint()
            paths = save_pictures(pictures, self.folder / "validation", done)
            if self.board is not None:
                self.board.pictures(done, pictures)
        return Moment(
            "training", done, progress.num_steps, progress.losses, progress.seconds_left, pictures=tuple(paths)
        )
