"""One call of a cascade under way: the prompt is read, the stages paint, and whoever watches is told.

B images  C channels  H height  W width  L text tokens  E encoder width
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from threading import Event as Flag
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from floyd.adapters.calls import call_scale
from floyd.pipelines.deepfloyd_if import IFPipeline
from floyd.pipelines.events import CascadeResult, Done, Event, StageDone, StageStarted, StepDone
from floyd.pipelines.finish import Finished
from floyd.pipelines.memory import Managed
from floyd.pipelines.options import Action, lora_scale
from floyd.pipelines.order import Order
from floyd.pipelines.painter import Painter
from floyd.pipelines.task import Task
from floyd.pipelines.timed import part_of
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
from floyd.runtime.clock import part
from floyd.runtime.sleeping import drop_fetched
from floyd.text.tokens import remind

if TYPE_CHECKING:
    from PIL.Image import Image

Text = tuple[Tensor, Tensor | None]  # positive_BLE, negative_BLE


@dataclass(eq=False)
class Run:
    """What a call knows while it works, and what it has painted so far."""

    order: Order
    stages: Mapping[str, Painter]
    memory: Managed | None
    load_text_encoder: Callable[[], Any] | None
    end: Flag  # set from outside, it asks the run to come to its end
    pictures: dict[str, list[Image]] = field(default_factory=dict)
    verdicts: list[Finished] = field(default_factory=list)
    is_whole: bool = True  # the last stage came to its last step

    def events(self) -> Generator[Event]:
        try:
            self._fetch_next(None)
            with part_of(self.stages["stage_1"], "other", stage="stage_1"):
                text = self._encoded()
            for name in self.order.stages:
                with part_of(self.stages[name], "other", stage=name):
                    self._fetch_next(name)
                    yield from self._painted(name, text)
                if self.end.is_set():
                    break
        finally:
            self._drop_fetched()
        is_interrupted = len(self.pictures) < len(self.order.stages) or not self.is_whole
        yield Done(
            result=CascadeResult.of(self.order.seeds, self.pictures, self.verdicts, is_interrupted=is_interrupted)
        )

    def _painted(self, name: str, text: Text) -> Iterator[Event]:
        """One stage."""
        stage, safety = self.stages[name], self.order.safety
        before = self.verdicts[-1] if self.verdicts else None
        task = self._task(name, text)
        num_steps, (width, height) = len(task.steps), self.order.sizes[name]
        yield StageStarted(stage=name, num_steps=num_steps, width=width, height=height)
        moved = None
        with closing(stage.watch(task)) as moves:
            for i, moved in enumerate(moves):
                yield StepDone(
                    stage=name,
                    index=i % num_steps,  # a second try begins again
                    num_steps=num_steps,
                    clean_BCHW=moved.clean_BCHW,
                    preview=partial(_shown, name, stage, moved.clean_BCHW, safety, before, task.colors),
                )
                if self.end.is_set():
                    break
        assert moved is not None, "a task has at least one step"
        self.is_whole = moved.step is task.steps[-1]
        x_BCHW = moved.x_BCHW if self.is_whole else moved.clean_BCHW
        told: dict[str, Any] = {"batch_invariant": self.order.batch_invariant, "colors_BCHW": task.colors}
        done = stage.finished(x_BCHW, safety, before=before, **told)
        self.verdicts.append(done)
        self.pictures[name] = done.pil()
        yield StageDone(stage=name, pictures=self.pictures[name])

    def _task(self, name: str, text: Text) -> Task:
        """The stage's arguments: what the order says, the text, and the picture of the stage before."""
        stage, told = self.stages[name], dict(self.order.stages[name])
        told |= self._text_for(stage, text, told)
        told |= {"generator": _generators(self.order.seeds, name), "batch_invariant": self.order.batch_invariant}
        if self.verdicts:
            told["image"] = self.verdicts[-1].picture_BCHW
        if not isinstance(stage, StableDiffusionUpscalePipeline):
            told["width"], told["height"] = self.order.sizes[name]
        return stage.task(**told)

    # ------------------------------------------------------------------------------------------------------------ text

    def _encoded(self) -> Text:
        """T5's reading of the prompt, once for all stages and images."""
        first, order = self.stages["stage_1"], self.order
        assert isinstance(first, IFPipeline)
        if first.text_encoder is None:
            assert self.load_text_encoder is not None, "the cascade has checked this"
            with part("transfers", count=0):
                first.text_encoder = self.load_text_encoder()
            remind(first.tokenizer, first.text_encoder)
        with call_scale(lora_scale(order.stages["stage_1"].get("cross_attention_kwargs"))):
            text = first.encode_prompt(
                order.prompt,
                negative_prompt=order.negative_prompt,
                clean_caption=order.clean_caption,
                batch_invariant=order.batch_invariant,
            )
        if order.free_text_encoder:
            first.text_encoder = None
        return text

    def _text_for(self, stage: Painter, text: Text, told: Mapping[str, Any]) -> dict[str, Any]:
        """Embeddings for every image; stage III reads the prompt with an encoder of its own."""
        if isinstance(stage, StableDiffusionUpscalePipeline):
            text = stage.encode_prompt(
                self.order.prompt,
                negative_prompt=self.order.negative_prompt,
                lora_scale=stage.text_lora_scale(told.get("cross_attention_kwargs")),
                clip_skip=told.get("clip_skip"),
                batch_invariant=self.order.batch_invariant,
            )
        count = len(self.order.seeds)
        positive_BLE, negative_BLE = (None if own is None else own.repeat(count, 1, 1) for own in text)
        return {"prompt_embeds": positive_BLE, "negative_prompt_embeds": negative_BLE}

    # ---------------------------------------------------------------------------------------------------------- memory

    def _fetch_next(self, current: str | None) -> None:
        """Have the next stage's weights read behind the one that is about to work; None is the reading of the text."""
        if self.memory is None:
            return
        names = list(self.order.stages)
        place = -1 if current is None else names.index(current)
        for name in names[place + 1 : place + 2]:
            parts = [(f"{name}.{component}", network) for component, network in self.stages[name].components.items()]
            coming = [row for row in parts if row[0].endswith(("unet", "vae")) or (place >= 0 and "encoder" in row[0])]
            self.memory.fetch(coming, during="stage_1.text_encoder" if current is None else f"{current}.unet")

    def _drop_fetched(self) -> None:
        """A run that ended early, or was left, has no use for what was fetched for it."""
        for stage in self.stages.values():
            for component in stage.components.values():
                drop_fetched(component)


def _shown(
    name: str,
    stage: Painter,
    clean_BCHW: Tensor,
    safety: Action,
    before: Finished | None,
    colors_BCHW: Tensor | None,
) -> list[Image]:
    with part_of(stage, "other", stage=name):
        return stage.preview(clean_BCHW, safety, before=before, colors_BCHW=colors_BCHW)


def _generators(seeds: tuple[int, ...], stage: str) -> list[torch.Generator]:
    """One for each image, from its own seed and the stage alone; on the CPU: a seed means the same everywhere."""
    return [torch.Generator().manual_seed(stage_seed(seed, stage)) for seed in seeds]


def stage_seed(seed: int, stage: str) -> int:
    """Stages must not share their noise, and neighbouring seeds must not share a stage's."""
    digest = blake2b(f"{seed}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
