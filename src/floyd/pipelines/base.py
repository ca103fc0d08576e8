"""What every pipeline is: named components that are loaded, moved and saved together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from tqdm.auto import tqdm

from floyd.pipelines.assembly import Assembly
from floyd.pipelines.loading import Request, load
from floyd.pipelines.memory import Managed, managed_one
from floyd.pipelines.recalling import Where
from floyd.pipelines.recalling import text_cache as _text_cache
from floyd.pipelines.registry import define, pipeline_class
from floyd.runtime.budget import Budget
from floyd.runtime.placement import WhereTheyAre, best_device, reachable
from floyd.store.components import save_component
from floyd.store.config import Config
from floyd.store.layout import write_index


class DiffusionPipeline(Assembly):
    """Components, and what is done with all of them.

    `DiffusionPipeline.from_pretrained` builds the class that the checkpoint names; called on a class of one's choice it
    builds that one from the same files.
    """

    optional_components: ClassVar[frozenset[str]] = frozenset()  # a checkpoint may lack them
    value_names: ClassVar[tuple[str, ...]] = ()  # arguments of the constructor that are no components

    config: Config
    _engine: tuple[str, Mapping[str, Any], Any] | None = None  # its name, its options, and the one that was made
    _progress_bar: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        define(cls)

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} has no components of its own; use from_pretrained or a concrete class.")

    def _register(self, components: Mapping[str, Any], **values: Any) -> None:
        """Subclasses' constructors end here: `components` in the order of `component_names`."""
        for name in self.component_names:
            setattr(self, name, components[name])
        self.config = Config.from_json(values)

    # ------------------------------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
        dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        device_map: str | torch.device | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        quantization: str | Mapping[str, str | None] | None = None,
        text_cache: Where = None,
        memory: Budget | str | int | None = None,
        **components: Any,
    ) -> Self:
        """A pipeline from a folder or a hub id.

        A component given as a keyword is taken instead of the checkpoint's, and None does without it; the files of
        neither are read or fetched. `variant` picks files ("fp16"), `torch_dtype` (or `dtype`) the precision, float32
        unless given; a mapping of component names to dtypes may hold "default". `device_map` "auto" or "balanced" is
        the machine's best device; a device's name is that device. `quantization`, "int8", "fp8" or "int4", keeps the
        weights of text encoder and UNet in fewer bits from the moment they are read; a mapping says it by component.
        `text_cache` "memory" or a folder keeps what the text encoder said of a prompt. `memory`, "auto", a size such as
        "8GB" or a Budget, chooses precision, quantization and place of each network by itself, so that a call fits and
        takes the least time; what is said of precision beside it is kept.
        """
        request = Request(
            source=pretrained_model_name_or_path,
            dtype=dtype if torch_dtype is None else torch_dtype,
            variant=variant,
            use_safetensors=use_safetensors,
            quantization=quantization,
            hub={
                "revision": revision,
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                "force_download": force_download,
            },
            given=components,
        )
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise ValueError(f"torch_dtype and dtype say the same thing; got {torch_dtype!r} and {dtype!r}.")
        if memory is not None:
            request = cls._planned(request, memory, device_map)
        device = device_of_map(device_map)
        cache = _text_cache(text_cache)
        pipeline: Any = load(request, cls._class_for)
        pipeline.text_cache = cache
        return pipeline if device is None else pipeline.to(device)

    @classmethod
    def _planned(cls, request: Request, memory: Any, device_map: Any) -> Request:
        """The request with a plan for its networks, whose files are here from then on."""
        if device_map is not None:
            raise ValueError("memory= chooses where each network lies, and so does device_map=: leave one out.")
        if not isinstance(memory, Managed):
            Budget.of(memory)  # whatever is wrong with it is wrong before anything is fetched
            absent = {name for name in request.given if name in cls.component_names or cls is DiffusionPipeline}
            folder = request.folder([n for n in request.components() if n not in absent])
            memory = managed_one(folder, memory, variant=request.variant, dtype=request.dtype, given=absent)
        return replace(request, memory=memory)

    @classmethod
    def _class_for(cls, class_name: str) -> type[DiffusionPipeline]:
        """What `from_pretrained` builds from a checkpoint of the named class."""
        return pipeline_class(class_name) if cls is DiffusionPipeline else cls

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **given: Any) -> Self:
        """This class over another pipeline's components, which both share from then on; nothing is loaded or copied.

        A component or value given as a keyword takes its place. The other's offloading, switches, engine and progress
        bar come along.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(f"{cls.__name__}.from_pipe takes a pipeline, got a {type(pipeline).__name__}.")
        known = {*cls.component_names, *cls.value_names}
        if unknown := sorted(set(given) - known):
            raise TypeError(f"{cls.__name__} does not take {', '.join(unknown)}; it takes {', '.join(sorted(known))}.")
        theirs = {**pipeline.components, **{name: pipeline.config[name] for name in pipeline.value_names}}
        parts = {name: part for name, part in theirs.items() if name in known} | given
        if absent := [n for n in cls.component_names if n not in {*parts, *cls.optional_components}]:
            raise ValueError(
                f"{cls.__name__} needs {', '.join(absent)}, which a {type(pipeline).__name__} does not have: it is "
                f"another stage. Pass {absent[0]}=..., or load a checkpoint of that stage."
            )
        pipe = cls(**{**dict.fromkeys(cls.optional_components), **parts})
        pipe.config = pipe.config.from_json({**pipe.config, "_name_or_path": pipeline.name_or_path})
        pipe._place(pipeline._placement)
        pipe._switches = pipeline._switches
        pipe.text_cache = pipeline.text_cache
        pipe._engine = pipeline._engine
        pipe._progress_bar = pipeline._progress_bar
        pipe.memory = pipeline.memory
        return pipe

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write every component into its folder, and the index; diffusers reads the result, too."""
        for name, component in self.components.items():
            if component is not None:
                with WhereTheyAre().use(component):  # one that sleeps is woken for it
                    save_component(
                        component,
                        save_directory,
                        name,
                        safe_serialization=safe_serialization,
                        variant=variant,
                        max_shard_size="10GB" if max_shard_size is None else max_shard_size,
                    )
        values = {name: self.config[name] for name in self.value_names}
        write_index(save_directory, type(self).__name__, self.components, values=values)

    @property
    def name_or_path(self) -> str | None:
        return self.config.get("_name_or_path")

    # -------------------------------------------------------------------------------------------------------- progress

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm: `disable=True` silences the bar."""
        self._progress_bar = options

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        if (iterable is None) == (total is None):
            raise ValueError("A progress bar needs either an iterable or a total.")
        return tqdm(iterable, total=total, **self._progress_bar)

    def __repr__(self) -> str:
        rows = [f"  {name}: {type(component).__name__}," for name, component in self.components.items()]
        return "\n".join([f"{type(self).__name__}(", *rows, ")"])


def device_of_map(device_map: str | torch.device | None) -> torch.device | None:
    """A pipeline is placed as a whole: "auto" and "balanced" mean the machine's best device."""
    if device_map is None:
        return None
    if device_map in ("auto", "balanced"):
        return best_device()
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map must be 'auto', 'balanced' or a device such as 'cpu' or 'cuda', got {device_map!r}."
        ) from error
    return reachable(device)
