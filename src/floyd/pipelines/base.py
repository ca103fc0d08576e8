"""What every pipeline is: named components that are loaded, moved and saved together."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn
from tqdm.auto import tqdm

from floyd.pipelines.loading import Request, load
from floyd.pipelines.recalling import Lent, Where
from floyd.pipelines.recalling import text_cache as _text_cache
from floyd.runtime.budget import Budget
from floyd.runtime.placement import (
    LayerByLayer,
    OneAtATime,
    Placement,
    WhereTheyAre,
    accelerator,
    best_device,
    device_of,
    is_settled,
    is_spread,
    reachable,
    rest,
    send,
)
from floyd.runtime.sleeping import is_asleep, release, wake
from floyd.runtime.switches import Switches
from floyd.store.components import save_component
from floyd.store.config import Config
from floyd.store.layout import write_index
from floyd.store.weights import has_adapters
from floyd.text.cache import TextCache

if TYPE_CHECKING:
    from floyd.pipelines.memory import Managed

log = logging.getLogger(__name__)

# Where the classes live that a checkpoint may name; classes of one's own are found once they are defined.
_HOMES = {
    "IFPipeline": "floyd.pipelines.deepfloyd_if",
    "IFSuperResolutionPipeline": "floyd.pipelines.deepfloyd_if",
    "IFImg2ImgPipeline": "floyd.pipelines.deepfloyd_if",
    "IFImg2ImgSuperResolutionPipeline": "floyd.pipelines.deepfloyd_if",
    "IFInpaintingPipeline": "floyd.pipelines.deepfloyd_if",
    "IFInpaintingSuperResolutionPipeline": "floyd.pipelines.deepfloyd_if",
    "StableDiffusionUpscalePipeline": "floyd.pipelines.upscale",
}
_DEFINED: dict[str, type[DiffusionPipeline]] = {}


class DiffusionPipeline:
    """Components, and what is done with all of them.

    `DiffusionPipeline.from_pretrained` builds the class that the checkpoint names; called on a class of one's choice it
    builds that one from the same files.
    """

    component_names: ClassVar[tuple[str, ...]] = ()
    optional_components: ClassVar[frozenset[str]] = frozenset()  # a checkpoint may lack them
    value_names: ClassVar[tuple[str, ...]] = ()  # arguments of the constructor that are no components

    config: Config
    _placement: Placement = WhereTheyAre()
    _switches: Switches | None = None
    text_cache: TextCache | None = None  # of prompts that were read
    _engine: tuple[str, Mapping[str, Any], Any] | None = None  # its name, its options, and the one that was made
    _progress_bar: Mapping[str, Any] = MappingProxyType({})
    memory: Managed | None = None  # the plan that says where the networks lie

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _DEFINED[cls.__name__] = cls

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
        from floyd.pipelines.memory import Managed, managed_one

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
    def components(self) -> dict[str, Any]:
        """By name, as another pipeline's constructor takes them: `IFImg2ImgPipeline(**pipe.components)`."""
        return {name: getattr(self, name) for name in self.component_names}

    @property
    def name_or_path(self) -> str | None:
        return self.config.get("_name_or_path")

    # ------------------------------------------------------------------------------------------ devices and precision

    def to(self, *args: Any, device: Any = None, dtype: torch.dtype | None = None) -> Self:
        """Move all networks to a device, cast them to a dtype, or both; in place. Ends offloading."""
        for argument in args:
            if isinstance(argument, torch.dtype) and dtype is None:
                dtype = argument
            elif isinstance(argument, str | int | torch.device) and device is None:
                device = argument
            elif argument is not None:
                raise TypeError(f"to() takes a device, a dtype or both, got {argument!r}.")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"The dtype of a pipeline must be a floating one, got {dtype}.")
        if device is not None:
            device = reachable(device)
            self._place(WhereTheyAre())
            self.memory = None
        for name, module in self._modules():
            wake(module)
            if is_spread(module):
                log.info("%s was spread over devices as it was loaded: it stays there, as it is.", name)
            elif getattr(module, "is_quantized", False):
                _move_quantized(name, module, device, dtype)
            else:
                send(module, device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the first network lies; with offloading, where it computes."""
        modules = [module for _, module in self._modules()]
        return self._placement.device_of(modules[0]) if modules else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        parameters = (p.dtype for _, module in self._modules() for p in module.parameters() if p.is_floating_point())
        return next(parameters, torch.float32)

    @property
    def switches(self) -> Switches:
        """The ways of computing faster that are on. Set `Switches(...)`, or None for what is best for the device."""
        return Switches.best_for(self.device) if self._switches is None else self._switches

    @switches.setter
    def switches(self, switches: Switches | None) -> None:
        if not isinstance(switches, Switches | None):
            raise TypeError(f"switches are a floyd.runtime.switches.Switches or None, got {switches!r}.")
        self._switches = switches

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep all networks in main memory, and on the accelerator only the one in use."""
        self._offload(OneAtATime, gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep all networks in main memory, and on the accelerator only the layer in use: slow, but smallest."""
        self._offload(LayerByLayer, gpu_id, device)

    def _offload(
        self, plan: type[OneAtATime] | type[LayerByLayer], gpu_id: int | None, device: torch.device | str | None
    ) -> None:
        target = accelerator() if device is None else reachable(device)
        if target is None or target.type == "cpu":
            log.info("There is no accelerator to offload from: everything stays in main memory.")
            return
        if gpu_id is not None:
            target = torch.device(target.type, gpu_id)
        for _, module in self._modules():
            wake(module)
            if not is_settled(module):
                module.to("cpu")
        self.memory = None
        self._place(plan(target))

    def _place(self, placement: Placement) -> None:
        self._placement = placement

    def _modules(self) -> list[tuple[str, nn.Module]]:
        return [(name, module) for name, module in self.components.items() if isinstance(module, nn.Module)]

    def _lent_encoder(self, is_steady: bool) -> Lent:
        """The text encoder for the length of a call, if there is anything to read. With LoRA it always reads.

        What LoRA says depends on the call.
        """
        encoder = self.components["text_encoder"]
        is_adapted = isinstance(encoder, nn.Module) and has_adapters(encoder)
        return Lent(self._placement, encoder, None if is_adapted else self.text_cache, is_steady=is_steady)

    def _device_for(self, *modules: object) -> torch.device:
        """Where the first of these that is present computes."""
        present = next((module for module in modules if module is not None), None)
        return torch.device("cpu") if present is None else self._placement.device_of(present)

    def manage(self, memory: Managed) -> None:
        """Let a plan say where the networks lie."""
        self.memory = memory
        networks = dict(self._modules())
        for name, network in networks.items():
            home = memory.home(name)
            if not is_asleep(network) and device_of(network) != home and memory.choice(name) is not None:
                network.to(home)
        self._place(memory.placement(networks))

    def unload(self) -> None:
        """Let go of the memory of all networks, the accelerator's and main memory.

        The pipeline stays whole: a network that came from a checkpoint is read from it again when it is next used, as
        it was loaded. What was given to the constructor is known from nowhere else, and moves to main memory.
        """
        for _, module in self._modules():
            if next(module.parameters(), None) is not None:  # a watermark is a picture, and always at hand
                rest(module)
        release()

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


def _move_quantized(name: str, module: nn.Module, device: Any, dtype: torch.dtype | None) -> None:
    """A quantized network keeps its precision, and most of them refuse even to be moved where they already are."""
    if dtype is not None:
        log.warning("%s is quantized: it keeps its precision.", name)
    if device is not None and torch.device(device).type != device_of(module).type:
        module.to(device=device)


def pipeline_class(class_name: str) -> type[DiffusionPipeline]:
    """The class that a checkpoint's index names."""
    if class_name not in _DEFINED and class_name in _HOMES:
        import_module(_HOMES[class_name])
    if class_name not in _DEFINED:
        raise ValueError(
            f"The checkpoint describes a {class_name}, which floyd does not have; it has {', '.join(sorted(_HOMES))}. "
            "Call from_pretrained on the class that you want."
        )
    return _DEFINED[class_name]


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
