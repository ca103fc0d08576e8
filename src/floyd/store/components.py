"""One component of a pipeline's folder: ours, or transformers' CLIP text encoder, tokenizer and image processor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from floyd.errors import CheckpointError
from floyd.store import layout, lazy, weights
from floyd.store.files import made, read_json
from floyd.store.filling import KEY, Quantization, fill, quantization_for, quantizing, refuse_packed
from floyd.store.pretrained import Configured, Model, as_dtype, mark_quantized, parameters_on_meta
from floyd.store.weights import some


def load_component(
    folder: str | os.PathLike[str],
    name: str,
    library: str,
    class_name: str,
    *,
    variant: str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    use_safetensors: bool | None = None,
    quantization: str | None = None,
) -> Any:
    """The component in `folder/name`, networks in evaluation mode and in float32 unless a dtype is given.

    Where the variant is missing the plain files are read; `hub.snapshot` has checked the pipeline as a whole.
    """
    cls = layout.resolve(library, class_name)
    path = Path(folder) / name
    if not path.is_dir():
        raise CheckpointError(f"{folder} has no folder {name!r} for the {class_name} that its index names.")
    if issubclass(cls, Configured) and not issubclass(cls, Model):
        return cls.from_pretrained(path)
    if not layout.has_weights(layout.ComponentType(library, class_name)):
        return load_files(cls, path)
    used = weights.available(path, variant=variant, use_safetensors=use_safetensors)
    if issubclass(cls, Model):
        files: dict[str, Any] = {"variant": used, "use_safetensors": use_safetensors}
        return cls.from_pretrained(path, torch_dtype=torch_dtype, quantization=quantization, **files)
    return _load_transformer(cls, path, used, as_dtype(torch_dtype), use_safetensors, quantization)


def shell(
    folder: str | os.PathLike[str], name: str, library: str, class_name: str, *, torch_dtype: torch.dtype | str | None
) -> torch.nn.Module | None:
    """The network in `folder/name` as its configuration describes it, without weights; None for what is no network."""
    if not layout.has_weights(layout.ComponentType(library, class_name)):
        return None
    cls: Any = layout.resolve(library, class_name)
    path, dtype = Path(folder) / name, as_dtype(torch_dtype)
    with parameters_on_meta():
        if issubclass(cls, Model):
            network: torch.nn.Module = cls.from_config(cls.load_config(path))
        else:
            network = cls(cls.config_class.from_pretrained(path, local_files_only=True))
    return network.to(dtype).eval()


def save_component(
    component: Any,
    folder: str | os.PathLike[str],
    name: str,
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write a component into `folder/name`, where floyd, diffusers and transformers look for it."""
    component = layout.uncompiled(component)
    kind = layout.type_of(component)
    path = made(Path(folder) / name)
    files: dict[str, Any] = {"variant": variant, "max_shard_size": max_shard_size}
    if not layout.has_weights(kind):
        component.save_pretrained(path)
    elif isinstance(component, Model) or kind.library != "transformers":
        component.save_pretrained(path, safe_serialization=safe_serialization, **files)
    elif safe_serialization and quantizing().quantization_of(component) is None:
        state = weights.without_adapters(component) if weights.has_adapters(component) else None
        component.save_pretrained(path, state_dict=state, **files)
    else:  # transformers itself no longer writes pickles, and does not know our layers
        component.config.save_pretrained(path)
        mark_quantized(component, path / "config.json")
        tied = getattr(component, "_tied_weights_keys", None) or {}  # those that are another's are stored once
        state = {key: tensor for key, tensor in weights.without_adapters(component).items() if key not in tied}
        weights.write(state, path, base="model", safe_serialization=safe_serialization, **files)


def load_files(cls: Any, path: Path) -> Any:
    """A tokenizer or an image processor."""
    _check_vocabulary(cls, path)
    try:
        return cls.from_pretrained(path, local_files_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} does not hold the files of a {cls.__name__}: {error}") from error


def _check_vocabulary(cls: Any, path: Path) -> None:
    """A tokenizer without its files is an error; transformers would make up an empty vocabulary."""
    names = dict(getattr(cls, "vocab_files_names", {}))
    whole = names.pop("tokenizer_file", None)  # tokenizer.json, which holds all the others
    if not names or (whole and (path / whole).is_file()):
        return
    if absent := [name for name in names.values() if not (path / name).is_file()]:
        raise CheckpointError(f"{path} does not hold the files of a {cls.__name__}: it lacks {some(absent)}.")


def _load_transformer(
    cls: Any,
    path: Path,
    variant: str | None,
    dtype: torch.dtype,
    use_safetensors: bool | None,
    quantization: str | None,
) -> Any:
    """A text encoder, from our own reading of the files, which knows every order of their names.

    transformers places the weights: it renames old keys. It would draw missing ones at random; here they are an error.
    """
    try:
        config = cls.config_class.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has no readable config.json: {error}") from error
    kept = quantization_for(read_json(path / "config.json"), quantization, path)
    files: dict[str, Any] = {"variant": variant, "use_safetensors": use_safetensors}
    if kept is not None and kept.is_stored:
        return _quantized(cls, config, lazy.opened(path, **files, is_mapped=False), dtype, str(path), kept)
    state = weights.read(path, **files)
    refuse_packed(state, str(path))
    try:
        options = {"config": config, "state_dict": state, "dtype": dtype, "output_loading_info": True}
        model, report = cls.from_pretrained(None, **options)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds weights of another shape than its config.json says: {error}") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := report.get(fault):
            named = some({str(key) for key in keys})
            raise CheckpointError(f"{path} does not fit {cls.__name__}; {fault.partition('_')[0]}: {named}.")
    return model.eval() if quantization is None else quantizing().quantize(model.eval(), quantization)


def _quantized(
    cls: Any, config: Any, state: Mapping[str, Tensor], dtype: torch.dtype, place: str, quantization: Quantization
) -> Any:
    """A network of transformers whose files hold its weights in fewer bits."""
    delattr(config, KEY)
    with parameters_on_meta():
        model = cls(config)
    fill(model, state, dtype=dtype, place=place, quantization=quantization)
    return model.eval()
