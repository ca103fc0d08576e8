"""The chain: one call from a prompt to 64, 256 or 1024 pixels.

B images  C channels  H height  W width  L text tokens  E encoder width
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from importlib.resources import files
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Generator, Tensor

from floyd.adapters.calls import call_scale
from floyd.diffusion.engine import Moved
from floyd.errors import ConfigError
from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.deepfloyd_if import IFPipeline, IFSuperResolutionPipeline
from floyd.pipelines.events import CascadeResult, Done, Event, StageDone, StageStarted, StepDone
from floyd.pipelines.finish import Finished
from floyd.pipelines.memory import Managed, Memory, managed
from floyd.pipelines.options import (
    ACTIONS,
    Action,
    Options,
    check_noise_level,
    lora_scale,
    positive,
    truth,
    with_defaults,
)
from floyd.pipelines.painter import Painter
from floyd.pipelines.qualities import Quality, checked, sampled
from floyd.pipelines.sizes import Sides, Size, planned
from floyd.pipelines.sizing import Workload
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
from floyd.pipelines.watching import Interrupts
from floyd.runtime.budget import Budget
from floyd.runtime.sleeping import drop_fetched
from floyd.store.hub import snapshot
from floyd.store.layout import read_index
from floyd.store.presets import STAGES, is_cascade, read_presets, stage_folders, write_presets
from floyd.text.checks import check_prompts
from floyd.text.tokens import remind

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Cascade", "CascadeResult", "Done", "StageDone", "StageStarted", "StepDone"]

PerStage = Sequence[Any]
_KINDS: tuple[tuple[type[Painter], ...], ...] = (
    (IFPipeline,),
    (IFSuperResolutionPipeline,),
    (StableDiffusionUpscalePipeline, IFSuperResolutionPipeline),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """A call, checked."""

    prompt: str
    negative_prompt: str | None
    clean_caption: bool
    seeds: tuple[int, ...]
    stages: Mapping[str, Mapping[str, Any]]  # the arguments of each stage that runs, without text and picture
    sizes: Mapping[str, Sides]
    free_text_encoder: bool
    safety: Action
    batch_invariant: bool

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if not isinstance(text, str) and (name == "prompt" or text is not None):
                raise TypeError(f"{name} of a cascade is one str, got {type(text).__name__}.")
        check_prompts(self.prompt, self.negative_prompt)
        truth("clean_caption", self.clean_caption)
        truth("free_text_encoder", self.free_text_encoder)
        truth("batch_invariant", self.batch_invariant)


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
                self._checked(name, options)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"The presets of {name} cannot be used: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        *models: str | os.PathLike[str],
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        memory: Memory | None = None,
        memory_for: Workload | None = None,
        **options: Any,
    ) -> Self:
        """From a folder that holds stages and perhaps `floyd.json`, or from one to three pipelines' folders or hub ids.

        `options` are those of `DiffusionPipeline.from_pretrained`: torch_dtype, variant, device_map, token, ... A given
        text encoder is stage I's; stage II gets none of its own. The safety checker and the watermark of stage I, or
        the given ones, serve all stages.

        `memory`: "auto", a size such as "8GB", or a Budget. Precision, quantization and place of each network are then
        chosen so that the whole chain fits and takes the least time; `memory_for` says for which call, one picture of
        the largest size unless told otherwise. `floyd plan` prints the choice.
        """
        if not 1 <= len(models) <= len(STAGES):
            raise ValueError(f"Name one folder of stages or one to {len(STAGES)} pipelines, got {len(models)}.")
        stored: Mapping[str, Mapping[str, Any]] = {}
        if len(models) == 1 and is_cascade(models[0]):
            stored = read_presets(models[0])
            models = tuple(stage_folders(models[0]).values())
        if foreign := sorted(set(options) & _OWN):
            raise TypeError(
                f"{', '.join(foreign)} belongs to a single stage: build the stages, and then Cascade(*stages)."
            )
        plan = _planned(models, memory, memory_for, stored if presets is None else presets, options)
        own: dict[str, dict[str, Any]] = {n: {"memory": plan.stage(n)} if plan else {} for n in STAGES}
        first = IFPipeline.from_pretrained(models[0], **options, **own["stage_1"])
        shared = {n: c for n, c in first.components.items() if n in _SHARED and (c is not None or n in options)}
        general = {name: option for name, option in options.items() if name not in IFPipeline.component_names}
        stages: list[Painter] = [first]
        if len(models) > 1:
            without: dict[str, Any] = {"text_encoder": None, "tokenizer": None, **own["stage_2"]}
            stages.append(IFSuperResolutionPipeline.from_pretrained(models[1], **shared, **without, **general))
        if len(models) > 2:
            general.pop("requires_safety_checker", None)
            general |= own["stage_3"]
            stages.append(DiffusionPipeline.from_pretrained(models[2], **shared, **general))  # type: ignore[arg-type]
        cascade = cls(*stages, presets=stored if presets is None else presets)
        cascade.memory = plan

        def load_text_encoder() -> Any:
            rest = {name: None for name in first.component_names if name != "text_encoder"}
            told = {**options, **rest, **own["stage_1"], "requires_safety_checker": False}
            return IFPipeline.from_pretrained(models[0], **told).text_encoder

        cascade._load_text_encoder = load_text_encoder
        return cascade

    @classmethod
    def built_in(cls, **options: Any) -> Self:
        """The small checkpoint that comes with floyd."""
        return cls.from_pretrained(os.fspath(files("floyd") / "mini"), **options)  # type: ignore[call-overload]

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
            name: sampled(name, stage, self.presets.get(name, {}), checked(quality))
            for name, stage in self.stages.items()
        }
        other.stages = {name: stage for name, (stage, _) in pairs.items()}
        other.presets = {name: preset for name, (_, preset) in pairs.items()}
        other._interrupts = Interrupts()
        return other

    @property
    def sizes(self) -> dict[str, int]:
        """The side in pixels that each stage paints by itself."""
        sizes: dict[str, int] = {}
        for name, stage in self.stages.items():
            if isinstance(stage, StableDiffusionUpscalePipeline):
                sizes[name] = sizes["stage_2"] * stage.factor
            else:
                sizes[name] = int(stage.unet.config.sample_size)
        return sizes

    def sizes_for(self, size: Size | None) -> dict[str, Sides]:
        """The stages that run for a size, and the width and height that each of them paints."""
        stages = self.stages.items()
        factors = {name: stage.factor for name, stage in stages if isinstance(stage, StableDiffusionUpscalePipeline)}
        return planned(size, self.sizes, factors)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        for stage in self.stages.values():
            stage.to(*args, **kwargs)
        return self

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
        likewise. `options` are further arguments by stage: `{"stage_2": {"noise_level": 100}}`. `free_text_encoder`
        drops T5 once the prompt is encoded, and loads it again when it is needed. `safety` is what is done with
        pictures that a stage's safety checker finds unsafe: "black", "blur", "flag" (tell alone) or "raise".
        `batch_invariant`: every bit of an image depends on its prompt and seed alone, not on `count` or the number of
        threads; the images are then painted one after the other, on one CPU thread.
        """
        for event in self.run(
            prompt,
            negative_prompt=negative_prompt,
            size=size,
            seed=seed,
            count=count,
            steps=steps,
            guidance=guidance,
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
        options: Mapping[str, Mapping[str, Any]] | None = None,
        clean_caption: bool = True,
        free_text_encoder: bool = False,
        safety: Action = "black",
        batch_invariant: bool = False,
    ) -> Iterator[Event]:
        """The same as an iterator of events, the last of which is `Done`; closing it stops. Checked at once."""
        sizes = self.sizes_for(size)
        positive("count", count)
        plan = _Plan(
            prompt=prompt,
            negative_prompt=negative_prompt,
            clean_caption=clean_caption,
            seeds=tuple(_seed(seed) + i for i in range(count)),
            stages=self._arguments(list(sizes), steps, guidance, options),
            sizes=sizes,
            free_text_encoder=free_text_encoder,
            safety=self._checked_safety(safety, list(sizes)),
            batch_invariant=batch_invariant,
        )
        if self.stages["stage_1"].components["text_encoder"] is None and self._load_text_encoder is None:
            raise ValueError("stage_1 has no text encoder, so no prompt can be read; build it with one.")
        if free_text_encoder and (names := self.stages["stage_1"].get_list_adapters().get("text_encoder")):
            raise ValueError(
                f"free_text_encoder would lose the LoRA of the text encoder ({', '.join(names)}), which comes back "
                "without: leave free_text_encoder out, or fuse and save the text encoder first."
            )
        return self._events(plan)

    def interrupt(self) -> None:
        """End every call and run under way, from any thread, after the step it is at.

        The stage it is at ends with the clean pictures predicted so far, which are the result; later calls are not
        affected. To end one stage early and go on with the next, interrupt that stage: `stages["stage_1"].interrupt()`.
        """
        self._interrupts.end_all()

    # -------------------------------------------------------------------------------------------------------- checking

    def _arguments(
        self, names: Sequence[str], steps: Any, guidance: Any, options: Mapping[str, Mapping[str, Any]] | None
    ) -> dict[str, dict[str, Any]]:
        """What each stage is told, checked."""
        options = {} if options is None else options
        if not isinstance(options, Mapping) or not all(isinstance(told, Mapping) for told in options.values()):
            raise TypeError(f"options must be a dict of dicts, by stage, got {options!r}.")
        if unknown := set(options) - set(self.stages):
            raise ValueError(f"options are by stage, {', '.join(self.stages)}; got {', '.join(map(str, unknown))}.")
        steps_of, guidance_of = self._spread("steps", steps, names), self._spread("guidance", guidance, names)
        arguments = {}
        for name in names:
            told = _steps(steps_of[name]) | _present(guidance_scale=guidance_of[name]) | dict(options.get(name, {}))
            arguments[name] = self._checked(name, self._merged(name, told))
        return arguments

    def _checked_safety(self, safety: Action, names: Sequence[str]) -> Action:
        if safety not in ACTIONS:
            raise ValueError(f"safety must be one of {', '.join(ACTIONS)}, got {safety!r}.")
        if safety != "black" and all(self.stages[name].safety_checker is None for name in names):
            raise ValueError(f"safety={safety!r} needs a safety_checker, which none of {', '.join(names)} has.")
        return safety

    def _spread(self, name: str, value: Any, names: Sequence[str]) -> dict[str, Any]:
        """One value for all stages, or one for each."""
        if not isinstance(value, list | tuple):
            return dict.fromkeys(names, value)
        if len(value) not in (len(names), len(self.stages)):
            raise ValueError(
                f"{name} must be one value or {len(names)}, one for each of {', '.join(names)}; got {value!r}."
            )
        return dict(zip(names, value, strict=False))

    def _merged(self, name: str, told: Mapping[str, Any]) -> dict[str, Any]:
        """What the caller said over what the checkpoint says; a number of steps is stronger than a stored table."""
        preset = self.presets.get(name, {})
        if "num_inference_steps" in told:
            preset = {key: value for key, value in preset.items() if key != "timesteps"}
        return {**preset, **told}

    def _checked(self, name: str, told: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse, before anything runs, what the stage would refuse."""
        stage = self.stages[name]
        if own := set(told) & _OURS:
            raise ValueError(f"{', '.join(sorted(own))} of {name} is what the cascade itself decides.")
        options = Options.of({**with_defaults(stage.__call__, told), "prompt": ""})
        stage.steps_for(options)
        if (level := told.get("noise_level")) is not None:
            check_noise_level(level, stage.noise_levels, f"noise_level of {name}")
        if isinstance(stage, StableDiffusionUpscalePipeline):
            stage.check_clip_skip(told.get("clip_skip"))
        return dict(told)

    # -------------------------------------------------------------------------------------------------------- painting

    def _events(self, plan: _Plan) -> Iterator[Event]:
        pictures: dict[str, list[Image]] = {}
        verdicts: list[Finished] = []
        is_whole = True
        with self._interrupts.call() as end:
            self._fetch_next(plan, None)
            text = self._encoded(plan)
            for name, told in plan.stages.items():
                stage, before = self.stages[name], verdicts[-1] if verdicts else None
                self._fetch_next(plan, name)
                image = {} if before is None else {"image": before.picture_BCHW}
                own = {"generator": _generators(plan, name), "batch_invariant": plan.batch_invariant}
                width, height = plan.sizes[name]
                if not isinstance(stage, StableDiffusionUpscalePipeline):
                    own |= {"width": width, "height": height}
                task = stage.task(**{**told, **image, **self._text_for(stage, text, plan, told), **own})
                yield StageStarted(stage=name, num_steps=len(task.steps), width=width, height=height)
                move: Moved | None = None
                with closing(stage.watch(task)) as moves:
                    for i, move in enumerate(moves):
                        show = partial(stage.preview, move.clean_BCHW, plan.safety, before=before)
                        yield _step_done(name, i % len(task.steps), len(task.steps), move.clean_BCHW, show)
                        if end.is_set():
                            break
                assert move is not None, "a task has at least one step"
                is_whole = move.step is task.steps[-1]
                x_BCHW = move.x_BCHW if is_whole else move.clean_BCHW
                done = stage.finished(x_BCHW, plan.safety, before=before, batch_invariant=plan.batch_invariant)
                verdicts.append(done)
                pictures[name] = verdicts[-1].pil()
                yield StageDone(stage=name, pictures=pictures[name])
                if end.is_set():
                    break
        for stage in self.stages.values():
            drop_fetched(stage.unet)  # an interrupted run has no use for it
        is_interrupted = len(pictures) < len(plan.stages) or not is_whole
        yield Done(result=CascadeResult.of(plan.seeds, pictures, verdicts, is_interrupted=is_interrupted))

    def _fetch_next(self, plan: _Plan, current: str | None) -> None:
        """Have the next stage's weights read behind the one that is about to work; None is the reading of the text."""
        if self.memory is None:
            return
        names = list(plan.stages)
        place = -1 if current is None else names.index(current)
        for name in names[place + 1 : place + 2]:
            parts = [(f"{name}.{part}", network) for part, network in self.stages[name].components.items()]
            coming = [row for row in parts if row[0].endswith(("unet", "vae")) or (place >= 0 and "encoder" in row[0])]
            self.memory.fetch(coming, during="stage_1.text_encoder" if current is None else f"{current}.unet")

    def _encoded(self, plan: _Plan) -> tuple[Tensor, Tensor | None]:
        """T5's reading of the prompt, once for all stages and images."""
        first = self.stages["stage_1"]
        assert isinstance(first, IFPipeline)
        if first.text_encoder is None:
            assert self._load_text_encoder is not None, "run() has checked this"
            first.text_encoder = self._load_text_encoder()
            remind(first.tokenizer, first.text_encoder)
        with call_scale(lora_scale(plan.stages["stage_1"].get("cross_attention_kwargs"))):
            text = first.encode_prompt(
                plan.prompt,
                negative_prompt=plan.negative_prompt,
                clean_caption=plan.clean_caption,
                batch_invariant=plan.batch_invariant,
            )
        if plan.free_text_encoder:
            first.text_encoder = None
        return text

    def _text_for(
        self, stage: Painter, text: tuple[Tensor, Tensor | None], plan: _Plan, told: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Embeddings for every image; stage III reads the prompt with an encoder of its own."""
        if isinstance(stage, StableDiffusionUpscalePipeline):
            text = stage.encode_prompt(
                plan.prompt,
                negative_prompt=plan.negative_prompt,
                lora_scale=stage.text_lora_scale(told.get("cross_attention_kwargs")),
                clip_skip=told.get("clip_skip"),
                batch_invariant=plan.batch_invariant,
            )
        count = len(plan.seeds)
        positive_BLE, negative_BLE = (None if part is None else part.repeat(count, 1, 1) for part in text)
        return {"prompt_embeds": positive_BLE, "negative_prompt_embeds": negative_BLE}


def _planned(
    models: Sequence[str | os.PathLike[str]],
    memory: Memory | None,
    workload: Workload | None,
    presets: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
) -> Managed | None:
    """The plan that was asked for; the files that it speaks of are on this machine from then on."""
    if memory is None:
        if workload is not None:
            raise ValueError("memory_for= says for which call a plan is made, and none is: pass memory='auto', too.")
        return None
    Budget.of(memory)
    if options.get("device_map") is not None:
        raise ValueError("memory= chooses where each network lies, and so does device_map=: leave one out.")
    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    given = {name for name in options if name in IFPipeline.component_names}
    folders = []
    for number, model in enumerate(models):
        index = read_index(snapshot(model, components=[], **hub))
        absent = given | ({"text_encoder", "tokenizer"} | set(_SHARED) if number == 1 else set())
        wanted = [name for name, kind in index.components.items() if kind is not None and name not in absent]
        folders.append(snapshot(model, components=wanted, **hub))
    dtype = options.get("torch_dtype", options.get("dtype"))
    return managed(
        folders,
        memory,
        variant=options.get("variant"),
        dtype=dtype,
        given=given,
        workload=workload,
        presets=presets,
        quantization=options.get("quantization"),
    )


_HUB_OPTIONS = "variant use_safetensors revision token cache_dir local_files_only force_download".split()
_OWN = frozenset({"unet", "scheduler", "image_noising_scheduler", "low_res_scheduler", "vae", "max_noise_level"})
_SHARED = ("safety_checker", "feature_extractor", "watermarker")
# Arguments of the stages that are not a caller's to set in `options` or a checkpoint's to set in its presets.
_OURS = frozenset(
    {
        "prompt",
        "negative_prompt",
        "prompt_embeds",
        "negative_prompt_embeds",
        "num_images_per_prompt",
        "image",
        "generator",
    }
    | {"output_type", "return_dict", "callback", "callback_steps", "clean_caption", "latents", "height", "width"}
    | {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "safety", "batch_invariant"}
)


def _step_done(
    name: str, index: int, num_steps: int, clean_BCHW: Tensor, preview: Callable[[], list[Image]]
) -> StepDone:
    return StepDone(stage=name, index=index, num_steps=num_steps, clean_BCHW=clean_BCHW, preview=preview)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise ValueError(f"seed must be an int of at least 0, got {value!r}.")
    return int(value)


def _steps(value: Any) -> dict[str, Any]:
    """A number, a respacing string or a table, as the stages name them."""
    if value is None:
        return {}
    if isinstance(value, Integral):
        positive("steps", value)
        return {"num_inference_steps": int(value)}
    if not isinstance(value, str | Sequence):
        raise TypeError(f"steps must be a number, a respacing string or a sequence of them by stage, got {value!r}.")
    return {"timesteps": value}


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _generators(plan: _Plan, stage: str) -> list[Generator]:
    """One for each image, from its own seed and the stage alone; on the CPU: a seed means the same everywhere."""
    return [Generator().manual_seed(stage_seed(seed, stage)) for seed in plan.seeds]


def stage_seed(seed: int, stage: str) -> int:
    """Stages must not share their noise, and neighbouring seeds must not share a stage's."""
    digest = blake2b(f"{seed}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
