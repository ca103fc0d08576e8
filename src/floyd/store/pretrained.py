"""What every component that lives in a checkpoint folder can do: be built from, read from and written to it."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from floyd.errors import CheckpointError
from floyd.store import hub, lazy, weights
from floyd.store.config import Config
from floyd.store.files import made, read_json, write_json
from floyd.store.filling import KEY, fill, quantization_for, quantizing
from floyd.store.layout import INDEX_NAME, floyd_version, read_index
from floyd.store.lazy import Renamed, shape_of
from floyd.store.pages import cast
from floyd.store.weights import some

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float64": torch.float64, "double": torch.float64,
}  # fmt: skip


class Configured:
    """A component that its configuration alone describes. Subclasses name their `config_class`."""

    config_name: ClassVar[str] = "config.json"
    config_class: ClassVar[type[Config]]
    config: Config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "config_class" in cls.__dict__:
            keys = [p for p in inspect.signature(cls.config_class).parameters.values() if p.name != "foreign"]
            cls.__signature__ = inspect.Signature(keys)  # type: ignore[attr-defined]

    def __init__(self, **keywords: Any) -> None:
        foreign = keywords.pop("foreign", {})
        self._refuse_unknown(keywords)
        self.config = self.config_class.from_json({**foreign, **keywords})

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from a configuration file's content; keys that are not ours are kept in `.config`."""
        read = cls.config_class.from_json(config, **overrides)
        return cls(**{key: read[key] for key in read.known_keys()}, foreign=read.foreign)

    @classmethod
    def load_config(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> dict[str, Any]:
        """The content of the configuration file in a folder or a hub repository."""
        source = hub.Source(path_or_id, revision, token, cache_dir, local_files_only, force_download)
        return cls._read_config(hub.component(source, subfolder, with_weights=False))

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **config_overrides: Any,
    ) -> Self:
        cls._refuse_unknown(config_overrides)
        config = cls.load_config(
            path_or_id,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return cls.from_config(config, **config_overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the configuration, foreign keys included, so that floyd and diffusers read it again."""
        own = {**self._own_keys(), "_floyd_version": floyd_version()}
        write_json(made(folder) / self.config_name, {**self.config.to_json(), **own})

    def _own_keys(self) -> dict[str, Any]:
        """What its file says of it beside the configuration: the keys by which others know what it is."""
        return {"_class_name": type(self).__name__}

    @classmethod
    def _read_config(cls, folder: Path) -> dict[str, Any]:
        if not (folder / cls.config_name).is_file() and (folder / INDEX_NAME).is_file():
            inside = ", ".join(name for name, kind in read_index(folder).components.items() if kind)
            raise CheckpointError(f"{folder} holds a whole pipeline; name one component with subfolder=: {inside}.")
        return read_json(folder / cls.config_name)

    @classmethod
    def _refuse_unknown(cls, keywords: Mapping[str, Any]) -> None:
        if unknown := sorted(set(keywords) - set(cls.config_class.known_keys())):
            allowed = ", ".join(cls.config_class.known_keys())
            raise TypeError(f"{cls.__name__} does not take {', '.join(unknown)}; it takes {allowed}.")


class Model(Configured, nn.Module):
    """A network whose weights lie beside its configuration."""

    weights_name: ClassVar[str] = "diffusion_pytorch_model"  # what `save_pretrained` calls the file

    def __init__(self, **keywords: Any) -> None:
        nn.Module.__init__(self)
        Configured.__init__(self, **keywords)

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @classmethod
    def rename_keys(cls, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A hook: the weights of an older checkpoint under today's names."""
        return state_dict

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        quantization: str | None = None,
        **config_overrides: Any,
    ) -> Self:
        """The network in evaluation mode, in float32 unless a dtype is given, whatever the files hold.

        `variant` picks files ("fp16"), `torch_dtype` (or `dtype`) the precision; neither implies the other.
        `quantization` ("int8", "fp8", "int4") keeps the weights of most layers in fewer bits, from the moment they are
        read; the precision is then that of the computation.
        """
        cls._refuse_unknown(config_overrides)
        precision = _one_dtype(torch_dtype, dtype)
        source = hub.Source(path_or_id, revision, token, cache_dir, local_files_only, force_download)
        folder = hub.component(source, subfolder, variant=variant, use_safetensors=use_safetensors)
        config = cls._read_config(folder)
        kept = quantization_for(config, quantization, folder)
        config.pop(KEY, None)
        with parameters_on_meta():
            model = cls.from_config(config, **config_overrides)
        files: dict[str, Any] = {"variant": variant, "use_safetensors": use_safetensors}
        state = lazy.opened(folder, **files, is_mapped=kept is None)
        if kept is None:
            model._fill(cls.rename_keys(state), precision, str(folder))
        else:
            fill(model, cls.rename_keys(state), dtype=precision, place=str(folder), quantization=kept)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        super().save_pretrained(folder)
        mark_quantized(self, Path(folder) / self.config_name)
        weights.write(
            weights.without_adapters(self),
            folder,
            base=self.weights_name,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
        )

    def _fill(self, state: Mapping[str, Tensor], dtype: torch.dtype, place: str) -> None:
        """Take the weights as they are or cast, one by one; refuse a state dict that does not fit exactly."""
        wanted = dict(self.state_dict())
        recomputed = {name for name, _ in self.named_buffers()} - wanted.keys()  # older files stored position_ids
        state = Renamed(state, {key: key for key in state if key not in recomputed})
        _check_fit(wanted, state, f"{place} does not fit {type(self).__name__}")
        parameters = {name for name, _ in self.named_parameters()}
        filled = {}
        for key, tensor in state.items():
            if key in parameters and wanted[key].is_floating_point():
                if not tensor.is_floating_point():
                    raise CheckpointError(
                        f"{place} is quantized: {key} is stored as {tensor.dtype}. Load the plain or fp16 weights and "
                        "quantize those."
                    )
                filled[key] = cast(tensor, dtype)
            else:
                filled[key] = cast(tensor, wanted[key].dtype)  # a watermark is stored as uint8 and drawn as float
        self.load_state_dict(filled, assign=True)
        if left := [name for name, p in [*self.named_parameters(), *self.named_buffers()] if p.is_meta]:
            raise CheckpointError(f"{place} left {some(left)} of {type(self).__name__} without weights.")


def mark_quantized(model: nn.Module, config_path: Path) -> None:
    """Say in a configuration file, already written, how the weights beside it are kept."""
    if (name := quantizing().quantization_of(model)) is not None:
        write_json(config_path, {**read_json(config_path), KEY: quantizing().config_of(name)})


def _check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], complaint: str) -> None:
    problems = []
    if missing := wanted.keys() - given.keys():
        problems.append(f"missing: {some(missing)}")
    if unexpected := given.keys() - wanted.keys():
        problems.append(f"unexpected: {some(unexpected)}")
    misshapen = {
        f"{key} is {shape_of(given, key)}, expected {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in given and shape_of(given, key) != tensor.shape
    }
    if misshapen:
        problems.append(f"wrong shape: {some(misshapen)}")
    if problems:
        raise CheckpointError(f"{complaint}; {'; '.join(problems)}. Are config.json and the weights of one network?")


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Networks built inside have no weights yet: their parameters lie on the meta device, their buffers are real.

    Buffers are computed by the network itself and small; parameters would be allocated and drawn at random only to
    be thrown away. Nor are they drawn on the meta device, for which torch would import its compiler: seconds. The hook
    is global to torch, hence the look at the thread; the mode is the thread's own.
    """
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook: Callable[..., Any] = to_meta  # torch's annotation has hooks return None, its code takes what they return
    handle = register_module_parameter_registration_hook(hook)
    try:
        with _Undrawn():
            yield
    finally:
        handle.remove()


class _Undrawn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = kwargs.get("tensor")  # how torch.nn.init passes on what it is to fill
        if getattr(func, "__module__", "") == "torch.nn.init" and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A floating dtype by itself or by name; None is float32."""
    named = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"torch_dtype must be a floating torch.dtype or one of {', '.join(_DTYPES)}, got {dtype!r}.")
    return named


def _one_dtype(torch_dtype: torch.dtype | str | None, dtype: torch.dtype | str | None) -> torch.dtype:
    if torch_dtype is not None and dtype is not None and as_dtype(torch_dtype) != as_dtype(dtype):
        raise ValueError(f"torch_dtype and dtype say the same thing; got {torch_dtype!r} and {dtype!r}.")
    return as_dtype(dtype if torch_dtype is None else torch_dtype)
