"""One component of a pipeline's folder: ours, or transformers' text encoders, tokenizers and image processor."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from floyd.errors import CheckpointError
from floyd.store import layout, weights
from floyd.store.files import made
from floyd.store.pretrained import Configured, Model, as_dtype
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
        return _load_files(cls, path)
    used = weights.available(path, variant=variant, use_safetensors=use_safetensors)
    if issubclass(cls, Model):
        return cls.from_pretrained(path, variant=used, torch_dtype=torch_dtype, use_safetensors=use_safetensors)
    return _load_transformer(cls, path, used, as_dtype(torch_dtype), use_safetensors)


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
    elif safe_serialization:
        state = weights.without_adapters(component) if weights.has_adapters(component) else None
        component.save_pretrained(path, state_dict=state, **files)
    else:  # transformers itself no longer writes pickles
        component.config.save_pretrained(path)
        weights.write(weights.without_adapters(component), path, base="model", safe_serialization=False, **files)


def _load_files(cls: Any, path: Path) -> Any:
    """A tokenizer or an image processor of transformers."""
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
    needed = (
        {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"} if "spiece.model" in names.values() else {}
    )
    if missing := [package for package, module in needed.items() if not _is_installed(module)]:
        raise CheckpointError(f"{path / 'spiece.model'} cannot be read without: pip install {' '.join(missing)}.")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is absent
        return False


def _load_transformer(
    cls: Any, path: Path, variant: str | None, dtype: torch.dtype, use_safetensors: bool | None
) -> Any:
    """A text encoder, from our own reading of the files, which knows every order of their names.

    transformers places the weights: it ties the embedding, renames old keys and keeps T5's `wo` in float32 under
    float16. It would draw missing weights at random; here they are an error.
    """
    try:
        config = cls.config_class.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has no readable config.json: {error}") from error
    state = weights.read(path, variant=variant, use_safetensors=use_safetensors)
    if integers := [key for key, w in state.items() if w.dtype in {torch.int8, torch.uint8} or key.endswith(".SCB")]:
        raise CheckpointError(
            f"{path} is quantized ({some(integers)}): load the plain or fp16 weights and quantize those."
        )
    try:
        options = {"config": config, "state_dict": state, "dtype": dtype, "output_loading_info": True}
        model, report = cls.from_pretrained(None, **options)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds weights of another shape than its config.json says: {error}") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := report.get(fault):
            named = some({str(key) for key in keys})
            raise CheckpointError(f"{path} does not fit {cls.__name__}; {fault.partition('_')[0]}: {named}.")
    return model.eval()
