"""From a checkpoint's folder to a pipeline's constructor."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from floyd.runtime.schemes import scheme_named
from floyd.runtime.sleeping import remember
from floyd.store.components import load_component, shell
from floyd.store.hub import snapshot
from floyd.store.layout import ComponentType, ModelIndex, read_index, type_of
from floyd.store.pretrained import as_dtype
from floyd.store.text_encoders import load_text_encoder, load_tokenizer

if TYPE_CHECKING:
    from floyd.pipelines.base import DiffusionPipeline
    from floyd.pipelines.memory import Managed

log = logging.getLogger(__name__)

P = TypeVar("P", bound="DiffusionPipeline")
Dtypes = torch.dtype | str | Mapping[str, torch.dtype | str] | None
Quantizations = str | Mapping[str, str | None] | None

_LARGE = ("text_encoder", "unet")  # what a quantization of no component in particular is for
_BITS = {"load_in_8bit": "int8", "load_in_4bit": "int4"}  # to leave these out would take several times the memory
_QUANTIZABLE = (*_LARGE, "vae", "safety_checker", "default")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `from_pretrained` was asked for."""

    source: str | os.PathLike[str]
    dtype: Dtypes = None
    variant: str | None = None
    use_safetensors: bool | None = None
    quantization: Quantizations = None
    hub: Mapping[str, Any] = field(default_factory=dict, repr=False)  # holds a token
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)  # components, values, and what nobody knows
    memory: Managed | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        names = self.dtype.values() if isinstance(self.dtype, Mapping) else [self.dtype]
        for name in names:
            as_dtype(name)
        self._check_quantization()
        if foreign := sorted(_BITS.keys() & self.given.keys()):
            word = foreign[0]
            raise TypeError(
                f"{word} is a word of transformers: pass quantization={{'text_encoder': '{_BITS[word]}'}} instead, or "
                "a text_encoder that was loaded with it."
            )

    def folder(self, components: list[str]) -> Any:
        """The local folder, with these components' files in it."""
        return snapshot(
            self.source,
            components=components,
            variant=self.variant,
            use_safetensors=self.use_safetensors,
            **self.hub,
        )

    def dtype_of(self, component: str) -> torch.dtype | str | None:
        if self.memory is not None and (planned := self.memory.dtype_of(component)) is not None:
            return planned
        if isinstance(self.dtype, Mapping):
            return self.dtype.get(component, self.dtype.get("default"))
        return self.dtype

    def quantization_of(self, component: str) -> str | None:
        told = self.quantization
        if isinstance(told, Mapping):
            return told.get(component, told.get("default") if component in _LARGE else None)
        return told if component in _LARGE else None

    def _check_quantization(self) -> None:
        told = self.quantization
        if told is not None and not isinstance(told, str | Mapping):
            raise TypeError(f"quantization must be a name, or names by component; got {told!r}.")
        by_name = told if isinstance(told, Mapping) else {"default": told}
        if unknown := sorted(set(by_name) - set(_QUANTIZABLE)):
            raise ValueError(f"quantization is of {', '.join(_QUANTIZABLE)}; got {', '.join(unknown)}.")
        for name in by_name.values():
            if name is not None:
                scheme_named(name)

    def components(self) -> list[str]:
        """All that the checkpoint has."""
        return [name for name, kind in read_index(self.folder([])).components.items() if kind is not None]

    def component(self, folder: Any, name: str, kind: ComponentType) -> Any:
        """Loaded, or told where its weights are to be read when it is used."""
        options: dict[str, Any] = {"variant": self.variant, "use_safetensors": self.use_safetensors}
        planned = None if self.memory is None else self.memory.quantization_of(name)
        options["quantization"] = planned or self.quantization_of(name)
        dtype = self.dtype_of(name)
        read = partial(load_component, folder, name, kind.library, kind.class_name, torch_dtype=dtype, **options)
        naps = self.memory is not None and self.memory.naps(name)
        component = shell(folder, name, *kind, torch_dtype=dtype) if naps else read()
        if isinstance(component, nn.Module):
            home = torch.device("cpu") if self.memory is None else self.memory.home(name)
            if home.type != "cpu":
                component.to(home)
            remember(component, read, naps=naps, is_asleep=naps, home=home)
        return component


def load(request: Request, choose: Callable[[str], type[P]]) -> P:
    """Build the chosen class from the checkpoint's components and the given ones."""
    index = read_index(request.folder([]))
    cls = choose(index.class_name)
    request = _with_files_read(request, index)
    known = (*cls.component_names, *cls.value_names)
    if unknown := sorted(set(request.given) - set(known)):
        log.warning(
            "%s.from_pretrained does not know %s; ignored. It knows %s.",
            cls.__name__,
            ", ".join(unknown),
            ", ".join(known),
        )
    kinds = _to_load(request, index, cls)
    folder = request.folder(list(kinds))
    components = dict.fromkeys(cls.component_names) | {
        name: request.component(folder, name, kind) for name, kind in kinds.items()
    }
    values = {name: index.values[name] for name in cls.value_names if name in index.values}
    given = {name: value for name, value in request.given.items() if name in known}
    pipeline = cls(**{**components, **values, **given})
    pipeline.config = pipeline.config.from_json({**pipeline.config, "_name_or_path": os.fspath(request.source)})
    if request.memory is not None:
        pipeline.manage(request.memory)
    return pipeline


def _with_files_read(request: Request, index: ModelIndex) -> Request:
    """A T5 or its tokenizer, given as where it lies, is loaded as the checkpoint's own would be."""
    kinds = {name: index.components.get(name) for name in ("text_encoder", "tokenizer")}
    paths = {name: request.given[name] for name in kinds if isinstance(request.given.get(name), str | os.PathLike)}
    for name in paths:
        kind = kinds[name]
        if kind is not None and not kind.class_name.startswith("T5"):
            raise ValueError(f"{name} of {index.class_name} is a {kind.class_name}; only of a T5 a path will do.")
    loaded: dict[str, Any] = {}
    hub = {key: value for key, value in request.hub.items() if key in {"token", "cache_dir", "local_files_only"}}
    if "tokenizer" in paths:
        loaded["tokenizer"] = load_tokenizer(paths["tokenizer"], **hub)
    if "text_encoder" in paths:
        told = {name: getattr(request, f"{name}_of")("text_encoder") for name in ("dtype", "quantization")}
        if os.path.isdir(paths["text_encoder"]):  # another repository need not have the variant of this one
            told["variant"] = request.variant
        loaded["text_encoder"] = load_text_encoder(paths["text_encoder"], **told, **hub)
    return replace(request, given={**request.given, **loaded}) if loaded else request


def _to_load(request: Request, index: ModelIndex, cls: type[DiffusionPipeline]) -> dict[str, ComponentType]:
    """What must come from the checkpoint: the class's components that were not given."""
    if ignored := sorted(index.components.keys() - set(cls.component_names)):
        log.warning("%s has no use for the checkpoint's %s.", cls.__name__, ", ".join(ignored))
    kinds = {}
    for name in cls.component_names:
        kind = index.components.get(name)
        if name in request.given:
            _compare(name, request.given[name], kind)
        elif kind is not None:
            kinds[name] = kind
    absent = [n for n in cls.component_names if n not in {*kinds, *request.given} and n not in cls.optional_components]
    if absent:
        raise ValueError(
            f"{cls.__name__} needs {', '.join(cls.component_names)}; {request.source} lacks {', '.join(absent)}. "
            f"Pass {absent[0]}=..., or {absent[0]}=None to do without."
        )
    return kinds


def _compare(name: str, component: object, kind: ComponentType | None) -> None:
    """Say so when a given component is not what the checkpoint was made with."""
    if component is None or kind is None:
        return
    try:
        found = type_of(component)
    except ValueError:
        return
    if found.class_name != kind.class_name and found.class_name not in kind.class_name:
        log.warning("The given %s is a %s; the checkpoint names a %s.", name, found.class_name, kind.class_name)
