"""From checkpoints to what a memory plan is made of: each network's weights, and the work that a call gives it.

Nothing is loaded. What is on the disk is read from the heads of its files, what is not is known by its id.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any

from floyd.diffusion.timesteps import respaced
from floyd.models.configs import UNetConfig
from floyd.models.costs import TEXT_TOKENS, Cost, decoder_cost, encoder_cost, unet_cost
from floyd.models.vae import AutoencoderKLConfig
from floyd.pipelines.known import KNOWN_IDS, Described, DescribedPipeline, known
from floyd.pipelines.registry import pipeline_class
from floyd.pipelines.sizes import Sides, planned
from floyd.runtime.machine import Machine
from floyd.runtime.parts import Part, Precision, Way, Weight
from floyd.store import hub
from floyd.store.headers import config_of, stored
from floyd.store.layout import read_index
from floyd.store.presets import STAGES, is_cascade, read_presets, stage_folders

PICTURE_COPIES = 12  # of what is painted, in float32, that a sampler's step holds at once: counted
SMALL_BYTES = 200_000_000  # of all weights: below it nothing is quantized
TILES = (128, 64, 32)  # sides of a tile of latents; a quarter of it overlaps the next
TILE_OVERLAP = 0.25


# Layers that quantization leaves as they are: small ones on which everything hangs, and tables.
_KEPT_WHOLE = frozenset(
    "conv_in conv_out time_embedding class_embedding shared embed_tokens relative_attention_bias token_embedding "
    "position_embedding patch_embedding".split()
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The call that a plan is made for."""

    size: int | tuple[int, int] | None = None
    count: int = 1
    steps: Sequence[int | None] = ()  # by stage; what is missing is the checkpoint's or the stage's own
    guidance: Sequence[float | None] = ()
    is_one_stage: bool = False  # a pipeline by itself

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise ValueError(f"count must be an int of at least 1, got {self.count!r}.")


def described(model: str | os.PathLike[str], *, variant: str | None = None, **hub_options: Any) -> DescribedPipeline:
    """A pipeline's networks. ValueError for an id that is neither on this machine nor known."""
    folder = hub.cached_folder(model, **hub_options)
    if folder is not None and _is_whole(folder, variant):
        return of_folder(folder, variant=variant)
    if (found := known(os.fspath(model))) is not None:
        return found
    raise ValueError(
        f"{os.fspath(model)!r} is not on this machine, so its sizes are unknown: download it first. Known without that "
        f"are {', '.join(KNOWN_IDS)}."
    )


def _is_whole(folder: Path, variant: str | None) -> bool:
    try:
        return bool(of_folder(folder, variant=variant).components)
    except (OSError, ValueError):
        return False


def of_folder(
    folder: Path, *, variant: str | None = None, components: Sequence[str] | None = None
) -> DescribedPipeline:
    index = read_index(folder)
    found = {}
    for name, kind in index.components.items():
        if kind is None or (components is not None and name not in components):
            continue
        tensors = stored(folder, name, variant=variant)
        if tensors is not None and kind.class_name not in ("IFWatermarker", "IFWatermark"):
            found[name] = Described(kind.class_name, config_of(folder, name), tuple(tensors))
    return DescribedPipeline(index.class_name, found)


@dataclass(frozen=True, eq=False)
class Sizing:
    """The networks of a cascade or a pipeline, and a call's work."""

    stages: Mapping[str, DescribedPipeline]
    workload: Workload
    machine: Machine
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fixed: Mapping[str, Precision] = field(default_factory=dict)  # by part: what the caller has decided

    @classmethod
    def of_models(
        cls,
        models: Sequence[str | os.PathLike[str]],
        *,
        machine: Machine,
        workload: Workload | None = None,
        variant: str | None = None,
    ) -> Sizing:
        """A cascade: one folder of stages, or one to three pipelines."""
        presets: Mapping[str, Mapping[str, Any]] = {}
        if len(models) == 1 and is_cascade(models[0]):
            presets = read_presets(models[0])
            models = tuple(stage_folders(models[0]).values())
        if not 1 <= len(models) <= len(STAGES):
            raise ValueError(f"Name one folder of stages or one to {len(STAGES)} pipelines, got {len(models)}.")
        found = {name: described(model, variant=variant) for name, model in zip(STAGES, models, strict=False)}
        return cls(found, workload or Workload(), machine, presets)

    @cached_property
    def sides(self) -> dict[str, Sides]:
        """The stages that run, and the width and height that each of them paints."""
        own: dict[str, int] = {}
        factors: dict[str, int] = {}
        for name, stage in self.stages.items():
            if (vae := stage.components.get("vae")) is not None:
                factors[name] = 2 ** (len(vae.config["block_out_channels"]) - 1)
                own[name] = list(own.values())[-1] * factors[name] if own else 4 * _side(stage)
            else:
                own[name] = _side(stage)
        return planned(self.workload.size, own, factors)

    def parts(self) -> list[Part]:
        found: list[Part] = []
        checkers = [name for name in self.sides if "safety_checker" in self.stages[name].components]
        for index, (name, sides) in enumerate(self.sides.items()):
            stage = self.stages[name]
            rows = self.workload.count * (2 if self._guidance(index, name) > 1 else 1)
            for component, one in stage.components.items():
                if component == "text_encoder" and (index == 0 or "vae" in stage.components):
                    found.append(self._reader(name, one, rows // self.workload.count))
                elif component == "unet":
                    found.append(self._painter(index, name, one, rows, sides))
                elif component == "vae":
                    found.append(self._decoder(name, one, sides))
                elif component == "safety_checker" and name == checkers[0]:
                    found.append(self._checker(name, one, len(self.sides)))
        return found

    # ------------------------------------------------------------------------------------------------------- networks

    def _reader(self, stage: str, one: Described, num_texts: int) -> Part:
        cost = encoder_cost(one.config, num_tokens=TEXT_TOKENS)
        way = Way(1, cost.flops, cost.numbers)
        return self._part(stage, "text_encoder", one, passes=num_texts, ways=(way,))

    def _painter(self, index: int, stage: str, one: Described, rows: int, sides: Sides) -> Part:
        config = UNetConfig.from_json(one.config)
        factor = 1 if "vae" not in self.stages[stage].components else self._factor(stage)
        width, height = (ceil(side / factor / config.side_multiple) * config.side_multiple for side in sides)
        cost = unet_cost(config, height, width)
        painted = self.workload.count * PICTURE_COPIES * 4 * config.in_channels * height * width
        ways = tuple(_rows(cost, rows, at_once) for at_once in _halves(rows))
        passes = self._steps(index, stage)
        return self._part(stage, "unet", one, passes=passes, ways=ways, held_bytes=painted)

    def _decoder(self, stage: str, one: Described, sides: Sides) -> Part:
        config, count, factor = AutoencoderKLConfig.from_json(one.config), self.workload.count, self._factor(stage)
        width, height = (ceil(side / factor) for side in sides)
        whole = decoder_cost(config, height, width)
        ways = [_rows(whole, count, at_once) for at_once in _halves(count)]
        for tile in TILES:
            if tile < max(width, height):
                stride = tile * (1 - TILE_OVERLAP)
                num_tiles = ceil(width / stride) * ceil(height / stride)
                cost = decoder_cost(config, min(tile, height), min(tile, width))
                ways.append(Way(count * num_tiles, count * num_tiles * cost.flops, cost.numbers, 1, tile))
        pictures = count * 3 * prod(sides) * 4 * 3  # decoded, in float32, and joined or treated
        return self._part(stage, "vae", one, passes=1, ways=tuple(ways), held_bytes=pictures)

    def _checker(self, stage: str, one: Described, num_looks: int) -> Part:
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        config = {**vision, "patch_size": 14, "image_size": 224, **(one.config.get("vision_config") or {})}
        num_tokens = 1 + (config["image_size"] // config["patch_size"]) ** 2
        cost = encoder_cost({**config, "d_ff": None}, num_tokens=num_tokens)
        count = self.workload.count
        way = Way(1, count * cost.flops, count * cost.numbers)
        return self._part(stage, "safety_checker", one, passes=num_looks, ways=(way,))

    def _part(
        self, stage: str, component: str, one: Described, *, passes: int, ways: tuple[Way, ...], held_bytes: int = 0
    ) -> Part:
        name = component if self.workload.is_one_stage else f"{stage}.{component}"
        return Part(
            name=name,
            weights=tuple(_weights(one, on_cpu=not self.machine.has_card)),
            precisions=self._precisions(name, component, one.class_name),
            passes=passes,
            ways=ways,
            stored_bytes=sum(tensor.num_bytes for tensor in one.tensors),
            held_bytes=held_bytes,
        )

    def _precisions(self, name: str, component: str, class_name: str) -> tuple[Precision, ...]:
        """What may be chosen, the most exact first. On a card 16 bits, of which a VAE needs bfloat16's range."""
        if (fixed := self.fixed.get(name)) is not None:
            return (fixed,)
        half = self.machine.half
        on_cpu = tuple(Precision(dtype) for dtype in dict.fromkeys(("float32", half)))
        exact = (Precision(half),) if self.machine.has_card else on_cpu
        if component == "vae":
            return (Precision("float32" if half == "float16" else half),) if self.machine.has_card else exact
        is_large = component == "unet" or (component == "text_encoder" and class_name == "T5EncoderModel")
        if not is_large or self.stages_are_small:
            return exact
        packed = Precision(half if self.machine.has_card else "float32", "int8")
        last_resort = (packed._replace(quantization="int4"),) if component == "text_encoder" else ()
        return (*exact, packed, *last_resort)

    @property
    def stages_are_small(self) -> bool:
        """Whether packing the weights would save less than it costs in quality."""
        weights = sum(
            t.num_bytes for stage in self.stages.values() for c in stage.components.values() for t in c.tensors
        )
        return weights < SMALL_BYTES

    def _factor(self, stage: str) -> int:
        return int(2 ** (len(self.stages[stage].components["vae"].config["block_out_channels"]) - 1))

    # --------------------------------------------------------------------------------------------- how it is called

    def _steps(self, index: int, stage: str) -> int:
        if index < len(self.workload.steps) and self.workload.steps[index] is not None:
            return int(self.workload.steps[index] or 1)
        preset = self.presets.get(stage, {})
        if "timesteps" in preset:
            table = preset["timesteps"]
            return len(respaced(table)) if isinstance(table, str) else len(table)
        return int(preset.get("num_inference_steps", self._default(stage, "num_inference_steps")))

    def _guidance(self, index: int, stage: str) -> float:
        if index < len(self.workload.guidance) and self.workload.guidance[index] is not None:
            return float(self.workload.guidance[index] or 0)
        return float(self.presets.get(stage, {}).get("guidance_scale", self._default(stage, "guidance_scale")))

    def _default(self, stage: str, name: str) -> Any:
        call = pipeline_class(self.stages[stage].class_name).__call__
        return inspect.signature(call).parameters[name].default

    def with_fixed(self, fixed: Mapping[str, Precision]) -> Sizing:
        return replace(self, fixed=fixed)


def _side(stage: DescribedPipeline) -> int:
    return int(stage.components["unet"].config["sample_size"])


def _halves(count: int) -> list[int]:
    found = [count]
    while found[-1] > 1:
        found.append(ceil(found[-1] / 2))
    return found


def _rows(cost: Cost, rows: int, at_once: int) -> Way:
    numbers = at_once * (cost.numbers - cost.text_numbers) + rows * cost.text_numbers
    return Way(ceil(rows / at_once), rows * cost.flops, numbers, at_once)


def _weights(one: Described, *, on_cpu: bool) -> Iterator[Weight]:
    is_t5, is_unet = one.class_name.startswith("T5"), one.class_name == "UNet2DConditionModel"
    names = {tensor.name for tensor in one.tensors}
    for tensor in one.tensors:
        if tensor.name == "encoder.embed_tokens.weight" and "shared.weight" in names:
            continue  # the same table
        unit, _, last = tensor.name.rpartition(".")
        packs = last == "weight" and len(tensor.shape) in (2, 4) and not _KEPT_WHOLE.intersection(unit.split("."))
        copies = _copies(unit, tensor.shape, names, on_cpu=on_cpu) if is_unet and last == "weight" else 0.0
        yield Weight(unit, tensor.shape, packs, is_t5 and ".wo." in tensor.name, copies)


def _copies(unit: str, shape: tuple[int, ...], names: Container[str], *, on_cpu: bool) -> float:
    """What a UNet's switches lay out anew: on a CPU kernels of more than one tap, everywhere the queries, keys and
    values of the pixels where one layer has all three."""
    layer, _, last = unit.rpartition(".")
    if len(shape) == 4 and shape[2:] != (1, 1):
        doubles = ".upsamplers." in unit and last in ("conv", "conv1")
        return 0.0 if not on_cpu else 16 / 9 if doubles else 1.0
    joins = (
        last in ("to_q", "to_k", "to_v") and f"{layer}.to_k.weight" in names and f"{layer}.add_k_proj.weight" in names
    )
    return float(joins)
