"""From checkpoints to the stages of a cascade, which share what they can and follow one memory plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.deepfloyd_if import IFPipeline, IFSuperResolutionPipeline
from floyd.pipelines.memory import Managed, Memory, managed
from floyd.pipelines.painter import Painter
from floyd.pipelines.sizes import Size, reaches
from floyd.pipelines.sizing import Sizing, Workload
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
from floyd.runtime.budget import Budget
from floyd.runtime.machine import cpu
from floyd.store.hub import snapshot
from floyd.store.layout import read_index
from floyd.store.presets import STAGES, is_cascade, read_presets, stage_folders

Model = str | os.PathLike[str]
Presets = Mapping[str, Mapping[str, Any]]

_HUB_OPTIONS = "variant use_safetensors revision token cache_dir local_files_only force_download".split()
_OWN = frozenset({"unet", "scheduler", "image_noising_scheduler", "low_res_scheduler", "vae", "max_noise_level"})
_SHARED = ("safety_checker", "feature_extractor", "watermarker")


@dataclass(frozen=True, kw_only=True, eq=False)
class Gathered:
    """What `Cascade.from_pretrained` is made of."""

    stages: Sequence[Painter]
    presets: Presets
    memory: Managed | None
    load_text_encoder: Callable[[], Any]  # stage I's, once more


def gathered(
    models: Sequence[Model],
    *,
    presets: Presets | None,
    memory: Memory | None,
    memory_for: Workload | None,
    up_to: Size | None,
    options: Mapping[str, Any],
) -> Gathered:
    """`options` are those of `DiffusionPipeline.from_pretrained`."""
    if not 1 <= len(models) <= len(STAGES):
        raise ValueError(f"Name one folder of stages or one to {len(STAGES)} pipelines, got {len(models)}.")
    stored: Presets = {}
    if len(models) == 1 and is_cascade(models[0]):
        stored = read_presets(models[0])
        models = tuple(stage_folders(models[0]).values())
    if foreign := sorted(set(options) & _OWN):
        raise TypeError(f"{', '.join(foreign)} belongs to a single stage: build the stages, and then Cascade(*stages).")
    presets = stored if presets is None else presets
    plan = _planned(models, memory, memory_for, presets, up_to, options)
    views: dict[str, dict[str, Any]] = {name: {"memory": plan.stage(name)} if plan else {} for name in STAGES}
    stages = _loaded(models, options, views, up_to)

    def load_text_encoder() -> Any:
        rest = {name: None for name in IFPipeline.component_names if name != "text_encoder"}
        told = {**options, **rest, **views["stage_1"], "requires_safety_checker": False}
        return IFPipeline.from_pretrained(models[0], **told).text_encoder

    return Gathered(stages=stages, presets=presets, memory=plan, load_text_encoder=load_text_encoder)


def sides_of(stages: Iterable[Painter]) -> list[int]:
    """The side in pixels that each stage paints by itself."""
    sides: list[int] = []
    for stage in stages:
        if isinstance(stage, StableDiffusionUpscalePipeline):
            sides.append(sides[-1] * stage.factor)
        else:
            sides.append(int(stage.unet.config.sample_size))
    return sides


def _loaded(
    models: Sequence[Model], options: Mapping[str, Any], views: Mapping[str, dict[str, Any]], up_to: Size | None
) -> list[Painter]:
    """The text encoder is stage I's alone; safety checker and watermark are stage I's, or the given ones, for all."""
    first = IFPipeline.from_pretrained(models[0], **options, **views["stage_1"])
    shared = {n: c for n, c in first.components.items() if n in _SHARED and (c is not None or n in options)}
    general = {name: option for name, option in options.items() if name not in IFPipeline.component_names}

    def second() -> Painter:
        without: dict[str, Any] = {"text_encoder": None, "tokenizer": None, **views["stage_2"]}
        return IFSuperResolutionPipeline.from_pretrained(models[1], **shared, **without, **general)

    def third() -> Painter:
        told = {name: option for name, option in general.items() if name != "requires_safety_checker"}
        return DiffusionPipeline.from_pretrained(models[2], **shared, **told, **views["stage_3"])  # type: ignore[return-value]

    stages: list[Painter] = [first]
    for load in (second, third)[: len(models) - 1]:
        if reaches(sides_of(stages)[-1], up_to):
            break
        stages.append(load())
    return stages


def _planned(
    models: Sequence[Model],
    memory: Memory | None,
    workload: Workload | None,
    presets: Presets,
    up_to: Size | None,
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
    variant = options.get("variant")
    folders: list[Model] = []
    for number, model in enumerate(models):
        index = read_index(snapshot(model, components=[], **hub))
        absent = given | ({"text_encoder", "tokenizer"} | set(_SHARED) if number == 1 else set())
        wanted = [name for name, kind in index.components.items() if kind is not None and name not in absent]
        folders.append(snapshot(model, components=wanted, **hub))
        if up_to is not None and reaches(_side_of_last(folders, variant), up_to):
            break
    if up_to is not None and (workload is None or workload.size is None):
        workload = replace(workload or Workload(), size=up_to)
    dtype = options.get("torch_dtype", options.get("dtype"))
    return managed(
        folders,
        memory,
        variant=variant,
        dtype=dtype,
        given=given,
        workload=workload,
        presets=presets,
        quantization=options.get("quantization"),
    )


def _side_of_last(folders: Sequence[Model], variant: str | None) -> int:
    """In pixels, of what the last of these pipelines paints by itself: as `sides_of`, with nothing loaded."""
    sides = Sizing.of_models(folders, machine=cpu(), variant=variant).sides
    return list(sides.values())[-1][0]
