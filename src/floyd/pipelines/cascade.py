"""The chain: one call from a prompt to 64, 256 or 1024 pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from importlib.resources import files
from typing import Any, Self

import torch

from floyd.engines.registry import AUTO
from floyd.errors import ConfigError, EngineError
from floyd.pipelines.deepfloyd_if import IFPipeline, IFSuperResolutionPipeline
from floyd.pipelines.events import CascadeResult, Done, Event, StageDone, StageStarted, StepDone
from floyd.pipelines.gathering import gathered, sides_of
from floyd.pipelines.memory import Managed, Memory
from floyd.pipelines.options import Action
from floyd.pipelines.order import Order, arguments_of, checked, checked_safety, seeds_of
from floyd.pipelines.painter import Painter
from floyd.pipelines.qualities import Quality, sampled
from floyd.pipelines.qualities import checked as checked_quality
from floyd.pipelines.run import Run
from floyd.pipelines.sizes import Sides, Size, planned
from floyd.pipelines.sizing import Workload
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
from floyd.pipelines.watching import Interrupts
from floyd.runtime.clock import passed_on
from floyd.runtime.profile import Profile
from floyd.store.presets import STAGES, write_presets

__all__ = ["Cascade", "CascadeResult", "Done", "StageDone", "StageStarted", "StepDone"]

PerStage = Sequence[Any]
_KINDS: tuple[tuple[type[Painter], ...], ...] = (
    (IFPipeline,),
    (IFSuperResolutionPipeline,),
    (StableDiffusionUpscalePipeline, IFSuperResolutionPipeline),
)


class Cascade:
    """Stages in order; each hands its picture to the next, and the prompt is encoded once.

    `cascade(prompt)` returns pictures; `cascade.run(prompt)` tells what happens on the way and may be left at any step.
    A component never changes during a call, so calls may share a cascade, unless one of them frees its text encoder.
    """

    def __init__(self, *stages: Painter, presets: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """`presets`: arguments that the stages are called with unless told otherwise, by stage name."""
        if not 1 <= len(stages) <= len(_KINDS):
            raise ValueError(f"A cascade has one to {len(_KINDS)} stages, got {len(stages)}.")
        for name, stage, kinds in zip(STAGES, stages, _KINDS, strict=False):
            if not isinstance(stage, kinds):
                allowed = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{name} of a cascade is an {allowed}, got a {type(stage).__name__}.")
        self.stages: dict[str, Painter] = dict(zip(STAGES, stages, strict=False))
        self.presets = {name: dict(options) for name, options in (presets or {}).items() if name in self.stages}
        self.memory: Managed | None = None  # the plan that says where the networks lie
        self._load_text_encoder: Callable[[], Any] | None = None
        self._interrupts = Interrupts()
        for name, options in self.presets.items():
            try:
                checked(name, self.stages[name], options)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"The presets of {name} cannot be used: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        *models: str | os.PathLike[str],
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        memory: Memory | None = None,
        memory_for: Workload | None = None,
        up_to: Size | None = None,
        **options: Any,
    ) -> Self:
        """From a folder that holds stages and perhaps `floyd.json`, or from one to three pipelines' folders or hub ids.

        `options` are those of `DiffusionPipeline.from_pretrained`: torch_dtype, variant, device_map, token, ... A given
        text encoder is stage I's; stage II gets none of its own. The safety checker and the watermark of stage I, or
        the given ones, serve all stages.

        `memory`: "auto", a size such as "8GB", or a Budget. Precision, quantization and place of each network are then
        chosen so that the whole chain fits and takes the least time; `memory_for` says for which call, one picture of
        the largest size (that of `up_to`) unless told otherwise. `floyd plan` prints the choice.

        `up_to`: the size of the largest pictures to be painted, as `size` of a call. Stages that these do not need are
        neither loaded nor downloaded.
        """
        found = gathered(models, presets=presets, memory=memory, memory_for=memory_for, up_to=up_to, options=options)
        cascade = cls(*found.stages, presets=found.presets)
        cascade.memory = found.memory
        cascade._load_text_encoder = found.load_text_encoder
        return cascade

    @classmethod
    def built_in(cls, **options: Any) -> Self:
        """The small checkpoint that comes with floyd. Where an engine can, it paints ("auto": see `use_engine`)."""
        cascade = cls.from_pretrained(os.fspath(files("floyd") / "mini"), **options)  # type: ignore[call-overload]
        if cascade.memory is None:
            cascade.use_engine(AUTO)
        return cascade

    def save_pretrained(self, root: str | os.PathLike[str], **options: Any) -> None:
        """A folder that `from_pretrained` reads; `options` are those of `DiffusionPipeline.save_pretrained`."""
        for name, stage in self.stages.items():
            stage.save_pretrained(os.path.join(root, name), **options)
        write_presets(root, self.presets)

    def with_quality(self, quality: Quality) -> Self:
        """This cascade, sampled otherwise: "draft", "standard" or "quality". The networks are shared, not copied.

        Each name is a sampler and a number of steps for each stage (docs/speed.md has what they cost and bring); all
        else that the checkpoint's presets say stays, and what a call says is stronger.
        """
        other = copy(self)
        pairs = {
            name: sampled(name, stage, self.presets.get(name, {}), checked_quality(quality))
            for name, stage in self.stages.items()
        }
        other.stages = {name: stage for name, (stage, _) in pairs.items()}
        other.presets = {name: preset for name, (_, preset) in pairs.items()}
        other._interrupts = Interrupts()
        return other

    @property
    def sizes(self) -> dict[str, int]:
        """The side in pixels that each stage paints by itself."""
        return dict(zip(self.stages, sides_of(self.stages.values()), strict=True))

    def sizes_for(self, size: Size | None) -> dict[str, Sides]:
        """The stages that run for a size, and the width and height that each of them paints."""
        stages = self.stages.items()
        factors = {name: stage.factor for name, stage in stages if isinstance(stage, StableDiffusionUpscalePipeline)}
        return planned(size, self.sizes, factors)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        for stage in self.stages.values():
            stage.to(*args, **kwargs)
        return self

    def use_engine(self, engine: str | None, **options: Any) -> None:
        """From now on run the networks of all stages by another engine: see `IFPipeline.use_engine`."""
        before = {name: stage._engine for name, stage in self.stages.items()}
        try:
            for stage in self.stages.values():
                stage.use_engine(engine, **options)
        except EngineError:
            for name, stage in self.stages.items():
                stage._engine = before[name]
            raise

    def unload(self) -> None:
        """Let go of the memory of all networks: see `DiffusionPipeline.unload`. The next call reads them again."""
        for stage in self.stages.values():
            stage.unload()

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        for stage in self.stages.values():
            stage.enable_model_cpu_offload(gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        for stage in self.stages.values():
            stage.enable_sequential_cpu_offload(gpu_id, device)

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        size: Size | None = None,
        seed: int = 0,
        count: int = 1,
        steps: int | str | PerStage | None = None,
        guidance: float | PerStage | None = None,
        guidance_interval: Sequence[int] | PerStage | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        clean_caption: bool = True,
        free_text_encoder: bool = False,
        safety: Action = "black",
        batch_invariant: bool = False,
    ) -> CascadeResult:
        """Paint `count` pictures.

        `size` is the side of one of the stages, 64, 256 or 1024 with IF: the chain stops there. Or it is the width and
        height of the picture that comes out last, any pair: (1536, 1024) is painted at 96x64, enlarged to 384x256 and
        then to 1536x1024, and (384, 256) is the second of these. What a network cannot halve is painted a little larger
        and cut off; a stage III that enlarges four times takes multiples of four. None is the largest.

        Image i has the seed `seed + i`, on which alone its noise depends. `steps` is a number or a respacing string for
        all stages, or a sequence with an entry for each; None leaves the checkpoint's or the stage's own. `guidance`
        likewise, and `guidance_interval`: (low, high) for all, or for each such a pair or None, the timesteps of
        training at which there is guidance; a step at another is half the work. `options` are further arguments by
        stage: `{"stage_2": {"noise_level": 100}}`. `free_text_encoder` drops T5 once the prompt is encoded, and loads
        it again when it is needed. `safety` is what is done with pictures that a stage's safety checker finds unsafe:
        "black", "blur", "flag" (tell alone) or "raise". `batch_invariant`: every bit of an image depends on its prompt
        and seed alone, not on `count` or the number of threads; the images are then painted one after the other, on
        one CPU thread.
        """
        for event in self.run(
            prompt,
            negative_prompt=negative_prompt,
            size=size,
            seed=seed,
            count=count,
            steps=steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            options=options,
            clean_caption=clean_caption,
            free_text_encoder=free_text_encoder,
            safety=safety,
            batch_invariant=batch_invariant,
        ):
            if isinstance(event, Done):
                return event.result
        raise AssertionError("run() ends with Done")

    def run(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        size: Size | None = None,
        seed: int = 0,
        count: int = 1,
        steps: int | str | PerStage | None = None,
        guidance: float | PerStage | None = None,
        guidance_interval: Sequence[int] | PerStage | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        clean_caption: bool = True,
        free_text_encoder: bool = False,
        safety: Action = "black",
        batch_invariant: bool = False,
    ) -> Iterator[Event]:
        """The same as an iterator of events, the last of which is `Done`; closing it stops. Checked at once."""
        sizes = self.sizes_for(size)
        order = Order(
            prompt=prompt,
            negative_prompt=negative_prompt,
            clean_caption=clean_caption,
            seeds=seeds_of(seed, count),
            stages=arguments_of(
                self.stages,
                self.presets,
                list(sizes),
                steps=steps,
                guidance=guidance,
                guidance_interval=guidance_interval,
                options=options,
            ),
            sizes=sizes,
            free_text_encoder=free_text_encoder,
            safety=checked_safety(safety, {name: self.stages[name] for name in sizes}),
            batch_invariant=batch_invariant,
        )
        if self.stages["stage_1"].components["text_encoder"] is None and self._load_text_encoder is None:
            raise ValueError("stage_1 has no text encoder, so no prompt can be read; build it with one.")
        if free_text_encoder and (names := self.stages["stage_1"].get_list_adapters().get("text_encoder")):
            raise ValueError(
                f"free_text_encoder would lose the LoRA of the text encoder ({', '.join(names)}), which comes back "
                "without: leave free_text_encoder out, or fuse and save the text encoder first."
            )
        return self._events(order)

    def profile(self, *, floor: bool = True) -> Profile:
        """Where the time goes: `with cascade.profile() as profile:`, calls, and after the block `print(profile)`."""
        return Profile(floor=floor)

    def interrupt(self) -> None:
        """End every call and run under way, from any thread, after the step it is at.

        The stage it is at ends with the clean pictures predicted so far, which are the result; later calls are not
        affected. To end one stage early and go on with the next, interrupt that stage: `stages["stage_1"].interrupt()`.
        """
        self._interrupts.end_all()

    def _events(self, order: Order) -> Iterator[Event]:
        with self._interrupts.call() as end:
            yield from passed_on(Run(order, self.stages, self.memory, self._load_text_encoder, end).events())
