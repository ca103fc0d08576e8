"""The chain: one call from a prompt to 64, 256 or 1024 pixels.

B images  C channels  H height  W width  L text tokens  E encoder width
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Generator, Tensor

from floyd.diffusion.engine import Moved
from floyd.errors import ConfigError
from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.deepfloyd_if import IFPipeline, IFSuperResolutionPipeline
from floyd.pipelines.events import CascadeResult, Done, Event, StageDone, StageStarted, StepDone
from floyd.pipelines.options import Options, check_noise_level, positive, with_defaults
from floyd.pipelines.painter import Painter
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
from floyd.store.presets import STAGES, is_cascade, read_presets, stage_folders, write_presets

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
    free_text_encoder: bool

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if not isinstance(text, str) and (name == "prompt" or text is not None):
                raise TypeError(f"{name} of a cascade is one str, got {type(text).__name__}.")
        seed = self.seeds[0]
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seed must be an int of at least 0, got {seed!r}.")


class Cascade:
    """Stages in order; each hands its picture to the next, and the prompt is encoded once.

    `cascade(prompt)` returns pictures; `cascade.run(prompt)` tells what happens on the way and may be left at any step.
    A component never changes during a call, so calls may share a cascade, unless it offloads or frees its text encoder.
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
        self._load_text_encoder: Callable[[], Any] | None = None
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
        **options: Any,
    ) -> Self:
        """From a folder that holds stages and perhaps `floyd.json`, or from one to three pipelines' folders or hub ids.

        `options` are those of `DiffusionPipeline.from_pretrained`: torch_dtype, variant, device_map, token, ... A given
        text encoder is stage I's; stage II gets none of its own. The safety checker and the watermark of stage I, or
        the given ones, serve all stages.
        """
        if not 1 <= len(models) <= len(STAGES):
            raise ValueError(f"Name one folder of stages or one to {len(STAGES)} pipelines, got {len(models)}.")
        stored: Mapping[str, Mapping[str, Any]] = {}
        if len(models) == 1 and is_cascade(models[0]):
            stored = read_presets(models[0])
            models = tuple(stage_folders(models[0]).values())
        if own := sorted(set(options) & _OWN):
            raise TypeError(f"{', '.join(own)} belongs to a single stage: build the stages, and then Cascade(*stages).")
        first = IFPipeline.from_pretrained(models[0], **options)
        shared = {n: c for n, c in first.components.items() if n in _SHARED and (c is not None or n in options)}
        general = {name: option for name, option in options.items() if name not in IFPipeline.component_names}
        stages: list[Painter] = [first]
        if len(models) > 1:
            without: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
            stages.append(IFSuperResolutionPipeline.from_pretrained(models[1], **shared, **without, **general))
        if len(models) > 2:
            general.pop("requires_safety_checker", None)
            stages.append(DiffusionPipeline.from_pretrained(models[2], **shared, **general))  # type: ignore[arg-type]
        cascade = cls(*stages, presets=stored if presets is None else presets)

        def load_text_encoder() -> Any:
            rest = {name: None for name in first.component_names if name != "text_encoder"}
            again = IFPipeline.from_pretrained(models[0], **{**options, **rest, "requires_safety_checker": False})
            return again.text_encoder

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

    @property
    def sizes(self) -> dict[str, int]:
        """The side in pixels that each stage reaches."""
        sizes: dict[str, int] = {}
        for name, stage in self.stages.items():
            if isinstance(stage, StableDiffusionUpscalePipeline):
                sizes[name] = sizes["stage_2"] * stage.factor
            else:
                sizes[name] = int(stage.unet.config.sample_size)
        return sizes

    def to(self, *args: Any, **kwargs: Any) -> Self:
        for stage in self.stages.values():
            stage.to(*args, **kwargs)
        return self

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
        size: int | None = None,
        seed: int = 0,
        count: int = 1,
        steps: int | str | PerStage | None = None,
        guidance: float | PerStage | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        clean_caption: bool = True,
        free_text_encoder: bool = False,
    ) -> CascadeResult:
        """Paint `count` pictures of `size` px (the largest unless given).

        Image i has the seed `seed + i`, on which alone its noise depends. `steps` is a number or a respacing string for
        all stages, or a sequence with an entry for each; None leaves the checkpoint's or the stage's own. `guidance`
        likewise. `options` are further arguments by stage: `{"stage_2": {"noise_level": 100}}`. `free_text_encoder`
        drops T5 once the prompt is encoded, and loads it again when it is needed.
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
        ):
            if isinstance(event, Done):
                return event.result
        raise AssertionError("run() ends with Done")

    def run(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        size: int | None = None,
        seed: int = 0,
        count: int = 1,
        steps: int | str | PerStage | None = None,
        guidance: float | PerStage | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        clean_caption: bool = True,
        free_text_encoder: bool = False,
    ) -> Iterator[Event]:
        """The same as an iterator of events, the last of which is `Done`; closing it stops. Checked at once."""
        names = self._names_up_to(size)
        positive("count", count)
        plan = _Plan(
            prompt=prompt,
            negative_prompt=negative_prompt,
            clean_caption=clean_caption,
            seeds=tuple(seed + i for i in range(count)),
            stages=self._arguments(names, steps, guidance, options or {}),
            free_text_encoder=free_text_encoder,
        )
        if self.stages["stage_1"].components["text_encoder"] is None and self._load_text_encoder is None:
            raise ValueError("stage_1 has no text encoder, so no prompt can be read; build it with one.")
        return self._events(plan)

    # -------------------------------------------------------------------------------------------------------- checking

    def _names_up_to(self, size: int | None) -> list[str]:
        names, sizes = list(self.stages), self.sizes
        if size is None:
            return names
        for i, name in enumerate(names):
            if sizes[name] == size:
                return names[: i + 1]
        reached = ", ".join(str(side) for side in sizes.values())
        raise ValueError(f"size must be one of {reached}, the sides that this cascade's stages reach; got {size!r}.")

    def _arguments(
        self, names: Sequence[str], steps: Any, guidance: Any, options: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """What each stage is told, checked."""
        if unknown := set(options) - set(self.stages):
            raise ValueError(f"options are by stage, {', '.join(self.stages)}; got {', '.join(sorted(unknown))}.")
        steps_of, guidance_of = self._spread("steps", steps, names), self._spread("guidance", guidance, names)
        arguments = {}
        for name in names:
            told = _steps(steps_of[name]) | _present(guidance_scale=guidance_of[name]) | dict(options.get(name, {}))
            arguments[name] = self._checked(name, self._merged(name, told))
        return arguments

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
        return dict(told)

    # -------------------------------------------------------------------------------------------------------- painting

    def _events(self, plan: _Plan) -> Iterator[Event]:
        pictures: dict[str, list[Image]] = {}
        flags: list[list[bool]] = []
        text = self._encoded(plan)
        handed_BCHW: Tensor | None = None
        for name, told in plan.stages.items():
            stage = self.stages[name]
            image = {} if handed_BCHW is None else {"image": handed_BCHW}
            told = {**told, **image, **self._text_for(stage, text, plan, told), "generator": _generators(plan, name)}
            task = stage.task(**told)
            yield StageStarted(stage=name, num_steps=len(task.steps), size=self.sizes[name])
            move: Moved | None = None
            with closing(stage.watch(task)) as moves:
                for i, move in enumerate(moves):
                    yield _step_done(name, stage, i, len(task.steps), move.clean_BCHW)
            assert move is not None, "a task has at least one step"
            finished = stage.finished(move.x_BCHW)
            handed_BCHW = finished.picture_BCHW
            pictures[name] = finished.pil()
            if finished.nsfw is not None:
                flags.append(finished.nsfw)
            yield StageDone(stage=name, pictures=pictures[name])
        nsfw = [any(one) for one in zip(*flags, strict=True)] if flags else None
        last = pictures[list(pictures)[-1]]
        yield Done(result=CascadeResult(images=last, stages=pictures, seeds=list(plan.seeds), nsfw_detected=nsfw))

    def _encoded(self, plan: _Plan) -> tuple[Tensor, Tensor | None]:
        """T5's reading of the prompt, once for all stages and images."""
        first = self.stages["stage_1"]
        assert isinstance(first, IFPipeline)
        if first.text_encoder is None:
            assert self._load_text_encoder is not None, "run() has checked this"
            first.text_encoder = self._load_text_encoder()
        text = first.encode_prompt(plan.prompt, negative_prompt=plan.negative_prompt, clean_caption=plan.clean_caption)
        if plan.free_text_encoder:
            first.text_encoder = None
        return text

    def _text_for(
        self, stage: Painter, text: tuple[Tensor, Tensor | None], plan: _Plan, told: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Embeddings for every image; stage III reads the prompt with an encoder of its own."""
        if isinstance(stage, StableDiffusionUpscalePipeline):
            text = stage.encode_prompt(
                plan.prompt, negative_prompt=plan.negative_prompt, clip_skip=told.get("clip_skip")
            )
        count = len(plan.seeds)
        positive_BLE, negative_BLE = (None if part is None else part.repeat(count, 1, 1) for part in text)
        return {"prompt_embeds": positive_BLE, "negative_prompt_embeds": negative_BLE}


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
)


def _step_done(name: str, stage: Painter, index: int, num_steps: int, clean_BCHW: Tensor) -> StepDone:
    def preview() -> list[Image]:
        return stage.finished(clean_BCHW).pil()

    return StepDone(stage=name, index=index, num_steps=num_steps, clean_BCHW=clean_BCHW, preview=preview)


def _steps(value: Any) -> dict[str, Any]:
    """A number, a respacing string or a table, as the stages name them."""
    if value is None:
        return {}
    return {"num_inference_steps": value} if isinstance(value, int) else {"timesteps": value}


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _generators(plan: _Plan, stage: str) -> list[Generator]:
    """One for each image, from its own seed and the stage alone; on the CPU: a seed means the same everywhere."""
    return [Generator().manual_seed(stage_seed(seed, stage)) for seed in plan.seeds]


def stage_seed(seed: int, stage: str) -> int:
    """Stages must not share their noise, and neighbouring seeds must not share a stage's."""
    digest = blake2b(f"{seed}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
