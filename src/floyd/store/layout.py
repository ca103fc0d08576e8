"""model_index.json: which class of which library each component of a pipeline is.

Checkpoints name the incumbent's classes. `CLASSES` says who stands in for them here; a class is imported when it is
asked for, so this room needs to know no other.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from floyd.errors import CheckpointError
from floyd.store.files import made, read_json, write_json
from floyd.store.imports import without_collecting

INDEX_NAME = "model_index.json"

# Written where a checkpoint has none: the version of diffusers whose layout this is, and whose reader is tested.
_DIFFUSERS_VERSION = "0.42.1"


class ComponentType(NamedTuple):
    """How an index names a component: `["transformers", "T5EncoderModel"]`."""

    library: str
    class_name: str


class _Class(NamedTuple):
    targets: tuple[str, ...]  # "module:attribute"; the first that exists
    has_weights: bool = False
    alias_of: str | None = None  # the name to write instead
    has_precision: bool = True  # False: its weights are the same in every variant


_LIBRARIES = ("diffusers", "deepfloyd_if", "transformers")  # whose classes floyd stands in for

CLASSES: dict[ComponentType, _Class] = {
    ComponentType(library, name): row
    for library, rows in {
        "diffusers": {
            "UNet2DConditionModel": _Class(("floyd.models.unet:UNet2DConditionModel",), has_weights=True),
            "AutoencoderKL": _Class(("floyd.models.vae:AutoencoderKL",), has_weights=True),
            "DDPMScheduler": _Class(("floyd.schedulers.ddpm:DDPMScheduler",)),
            "DDIMScheduler": _Class(("floyd.schedulers.ddim:DDIMScheduler",)),
            "DPMSolverMultistepScheduler": _Class(("floyd.schedulers.multistep:DPMSolverMultistepScheduler",)),
            "EulerAncestralDiscreteScheduler": _Class(("floyd.schedulers.euler:EulerAncestralDiscreteScheduler",)),
            "EulerDiscreteScheduler": _Class(("floyd.schedulers.euler:EulerDiscreteScheduler",)),
            "HeunDiscreteScheduler": _Class(("floyd.schedulers.euler:HeunDiscreteScheduler",)),
            "UniPCMultistepScheduler": _Class(("floyd.schedulers.multistep:UniPCMultistepScheduler",)),
        },
        "deepfloyd_if": {
            "IFSafetyChecker": _Class(("floyd.models.safety:IFSafetyChecker",), has_weights=True),
            "IFWatermarker": _Class(("floyd.models.watermark:IFWatermarker",), True, has_precision=False),
            "IFWatermark": _Class(("floyd.models.watermark:IFWatermarker",), True, "IFWatermarker", False),
        },
        "transformers": {
            "T5EncoderModel": _Class(("floyd.models.t5:T5EncoderModel",), has_weights=True),
            "T5Tokenizer": _Class(("floyd.store.t5_tokenizer:T5Tokenizer",)),
            "T5TokenizerFast": _Class(("floyd.store.t5_tokenizer:T5Tokenizer",), False, "T5Tokenizer"),
            "CLIPTextModel": _Class(("transformers:CLIPTextModel",), has_weights=True),
            "CLIPTokenizer": _Class(("transformers:CLIPTokenizer",)),
            "CLIPTokenizerFast": _Class(
                ("transformers:CLIPTokenizerFast", "transformers:CLIPTokenizer"), False, "CLIPTokenizer"
            ),
            # The PIL backend by name: the plain name means torchvision's, which resizes differently and may be absent.
            "CLIPImageProcessor": _Class(("transformers:CLIPImageProcessorPil", "transformers:CLIPImageProcessor")),
            "CLIPImageProcessorPil": _Class(("transformers:CLIPImageProcessorPil",), False, "CLIPImageProcessor"),
            "CLIPFeatureExtractor": _Class(
                ("transformers:CLIPImageProcessorPil", "transformers:CLIPImageProcessor"), False, "CLIPImageProcessor"
            ),
        },
    }.items()
    for name, row in rows.items()
}


@dataclass(frozen=True, kw_only=True)
class ModelIndex:
    """The content of model_index.json, sorted by what it means."""

    class_name: str  # of the pipeline
    components: Mapping[str, ComponentType | None]  # None: the pipeline is to be built without it
    values: Mapping[str, Any] = field(default_factory=dict)  # requires_safety_checker, max_noise_level
    foreign: Mapping[str, Any] = field(default_factory=dict)  # `_ignore_files`, `_diffusers_version`


def read_index(folder: str | os.PathLike[str]) -> ModelIndex:
    path = Path(folder) / INDEX_NAME
    return index_of(read_json(path), path)


def index_of(content: Mapping[str, Any], path: object) -> ModelIndex:
    """The same from what the file holds; `path` is for complaints."""
    content = dict(content)
    class_name = content.pop("_class_name", None)
    if not isinstance(class_name, str):
        raise CheckpointError(f"{path} does not say which pipeline it describes: `_class_name` is {class_name!r}.")
    components: dict[str, ComponentType | None] = {}
    values, foreign = {}, {}
    for name, value in content.items():
        if name.startswith("_"):
            foreign[name] = value
        elif isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value):
            components[name] = _component(path, name, *value)
        else:
            values[name] = value
    return ModelIndex(class_name=class_name, components=components, values=values, foreign=foreign)


def _component(path: object, name: str, library: str | None, class_name: str | None) -> ComponentType | None:
    if not name.isidentifier():  # it becomes a folder's name
        raise CheckpointError(f"{path} names a component {name!r}, which cannot be a folder of the checkpoint.")
    if library is None and class_name is None:
        return None
    if library is None or class_name is None:
        raise CheckpointError(f"{path}: {name} must be [library, class] or [null, null], got {[library, class_name]}.")
    return ComponentType(library, class_name)


def write_index(
    folder: str | os.PathLike[str],
    class_name: str,
    components: Mapping[str, object | None],
    *,
    values: Mapping[str, Any] | None = None,
    foreign: Mapping[str, Any] | None = None,
) -> None:
    """Describe live components, None for those the pipeline does without, so that diffusers can read it too."""
    pairs = {name: [None, None] if it is None else list(type_of(it)) for name, it in components.items()}
    versions = {"_diffusers_version": _DIFFUSERS_VERSION, **(foreign or {}), "_floyd_version": floyd_version()}
    write_json(made(folder) / INDEX_NAME, {**versions, **(values or {}), **pairs, "_class_name": class_name})


def resolve(library: str, class_name: str) -> type:
    """The class that stands in for the one a checkpoint names."""
    row = CLASSES.get(ComponentType(library, class_name))
    if row is None:
        known = ", ".join(name for lib, name in CLASSES if lib == library) or "nothing"
        raise CheckpointError(
            f"floyd has no stand-in for {class_name} of {library!r}; of this library it knows {known}. "
            "Pass the component to from_pretrained yourself, or None to do without."
        )
    for target in row.targets:
        module, _, attribute = target.partition(":")
        with without_collecting():
            found: type | None = getattr(importlib.import_module(module), attribute, None)
        if found is not None:
            return found
    raise CheckpointError(f"The installed {row.targets[0].partition(':')[0]} has no {class_name}.")


def has_weights(component: ComponentType) -> bool:
    row = CLASSES.get(component)
    return row is not None and row.has_weights


def has_precision(component: ComponentType | None) -> bool:
    """Whether a variant such as "fp16" of its weights is to be expected: a watermark is bytes in all of them."""
    row = None if component is None else CLASSES.get(component)
    return row is not None and row.has_weights and row.has_precision


def type_of(component: object) -> ComponentType:
    """How an index names a live component, by the nearest class that the table knows."""
    for cls in type(uncompiled(component)).__mro__:
        library = cls.__module__.partition(".")[0]
        if library in {"floyd", "diffusers", "transformers"}:
            for candidate in ("transformers",) if library == "transformers" else _LIBRARIES:
                if row := CLASSES.get(ComponentType(candidate, cls.__name__)):
                    return ComponentType(candidate, row.alias_of or cls.__name__)
    raise ValueError(
        f"A {type(component).__name__} cannot be saved in a pipeline's folder; "
        f"floyd saves {', '.join(sorted({name for _, name in CLASSES}))}."
    )


def floyd_version() -> str:
    """The installed version, or "0" where floyd runs from its sources."""
    try:
        return version("floyd-if")
    except PackageNotFoundError:
        return "0"


def uncompiled(component: Any) -> Any:
    """What torch.compile wrapped."""
    return getattr(component, "_orig_mod", component)
