"""State dicts on disk: safetensors first, pickles only without code, whole or in shards.

A file is read through a memory map: a weight that needs no cast stays on disk until it is used, and the system may
drop it again. Files are therefore replaced by renaming, never overwritten.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from floyd.errors import CheckpointError
from floyd.store import naming
from floyd.store.files import made, read_json, replacing, write_json
from floyd.store.naming import PICKLED, SAFE, WeightSet

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read(
    folder: str | os.PathLike[str], *, variant: str | None = None, use_safetensors: bool | None = None
) -> dict[str, Tensor]:
    """The state dict in a component's folder. The variant must exist; see `available` for falling back."""
    state: dict[str, Tensor] = {}
    for file in files(Path(folder), variant=variant, use_safetensors=use_safetensors):
        part = read_file(file)
        if doubled := state.keys() & part.keys():
            raise CheckpointError(f"{file} repeats {some(doubled)} of the shards before it.")
        state.update(part)
    return state


def files(folder: Path, *, variant: str | None, use_safetensors: bool | None) -> list[Path]:
    """The files that together hold the state dict."""
    return files_of(folder, find(folder, variant=variant, use_safetensors=use_safetensors))


def find(folder: Path, *, variant: str | None, use_safetensors: bool | None) -> WeightSet:
    """The files to read. ValueError for a variant that is not there, CheckpointError where there are no weights."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if found := naming.choose(names, variant=variant, use_safetensors=use_safetensors):
        return found
    if use_safetensors is not None and naming.choose(names, variant=variant, use_safetensors=not use_safetensors):
        wanted, there = (SAFE, PICKLED) if use_safetensors else (PICKLED, SAFE)
        raise CheckpointError(
            f"{folder} has its weights as .{there}, not as .{wanted}: leave use_safetensors={use_safetensors} out."
        )
    if variant is not None and any(map(naming.is_weights, names)):
        raise ValueError(no_such_variant(str(folder), variant, naming.variants(names)))
    if others := naming.variants(names):
        raise CheckpointError(f"{folder} has weights only as the variants {', '.join(others)}: ask for one of them.")
    raise CheckpointError(f"{folder} has no weights: expected {naming.BASES[0]}.{SAFE} or model.{SAFE}.")


def available(folder: Path, *, variant: str | None, use_safetensors: bool | None) -> str | None:
    """The variant if the folder has it, else None, which stands for the plain files."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return variant if naming.choose(names, variant=variant, use_safetensors=use_safetensors) else None


def no_such_variant(place: str, variant: str, found: Sequence[str]) -> str:
    there = f"only {', '.join(found)} and perhaps plain files" if found else "only plain files"
    return f"{place} has no weights of the variant {variant!r}, {there}: pass one of these, or variant=None."


def files_of(folder: Path, found: WeightSet) -> list[Path]:
    """Where there is an index, it says which shards count; its names must stay inside the folder."""
    names: Sequence[str] = found.files
    if found.index is not None:
        weight_map = read_json(folder / found.index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / found.index} has no weight_map from keys to file names.")
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{folder / found.index} points outside its folder: {some(outside)}.")
    elif found.num_missing:
        raise CheckpointError(f"{folder} lacks {found.num_missing} of the shards of {found.files[0]}.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {some(missing)}, of which {found.index} speaks.")
    return [folder / name for name in names]


def read_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """One file's tensors, on the CPU. A pickle that holds anything but tensors and plain containers is refused."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    if path.suffix == f".{SAFE}":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file: {why(path, error)}") from error
    if path.suffix in {f".{PICKLED}", ".pt", ".pth", ".ckpt"}:
        return _read_pickled(path)
    raise ValueError(f"Weights are read from .{SAFE} or .{PICKLED} files, got {path}.")


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused, because it is no pickle of tensors alone: {why(path, error)} "
            f"Use a .{SAFE} file instead."
        ) from error
    except Exception as error:  # a damaged pickle is a program gone astray: it may raise anything
        raise CheckpointError(f"{path} is broken: {why(path, error)}") from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise CheckpointError(f"{path} must hold a dict of tensors; it holds something else.")
    return dict(content)


def why(path: Path, error: Exception) -> str:
    """In one line, why a file cannot be read."""
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return "it is a git-lfs pointer, run `git lfs pull`."
    return str(error).partition("\n")[0]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings in a safetensors file's header."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def write(
    state: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    base: str = naming.BASES[0],
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write a state dict, in shards if it is too large, and remove what an earlier save of the same name left over."""
    path, suffix = made(folder), SAFE if safe_serialization else PICKLED
    base = "pytorch_model" if suffix == PICKLED and base == "model" else base
    shards = list(_shards(state, _num_bytes(max_shard_size)))
    total = len(shards) if len(shards) > 1 else 0
    written: dict[str, list[str]] = {}
    for number, keys in enumerate(shards, start=1):
        name = naming.weights_name(base, suffix, variant=variant, number=number if total else 0, total=total)
        write_file({key: state[key] for key in keys}, path / name)
        written[name] = keys
    index = naming.index_name(base, suffix, variant=variant)
    if total:
        size = sum(tensor.nbytes for tensor in state.values())
        weight_map = {key: name for name, keys in written.items() for key in keys}
        write_json(path / index, {"metadata": {"total_size": size}, "weight_map": weight_map})
    for entry in path.iterdir():
        file = naming.parse(entry.name)
        is_same = file is not None and (file.base, file.suffix, file.variant) == (base, suffix, variant)
        if is_same and entry.name not in written and not (total and entry.name == index):
            entry.unlink()


def has_adapters(module: nn.Module) -> bool:
    """Whether peft has put anything on a network's layers."""
    return any(hasattr(layer, "base_layer") for layer in module.modules())


def without_adapters(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network as if peft had put nothing on its layers; what is fused is in the weights."""
    wrapped = [f"{name}." for name, layer in module.named_modules() if hasattr(layer, "base_layer")]
    state = {}
    for key, tensor in module.state_dict().items():
        start = next((start for start in wrapped if key.startswith(start)), None)
        if start is None:
            state[key] = tensor
        elif key.startswith(f"{start}base_layer."):
            state[start + key.removeprefix(f"{start}base_layer.")] = tensor
    return state


def write_file(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """One file, safetensors or pickled by its name. It appears whole or not at all."""
    path = Path(path)
    if on_meta := [key for key, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"Cannot save weights that are not there: {some(on_meta)} on the meta device.")
    tensors = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    with replacing(path) as temporary:
        if path.suffix == f".{SAFE}":
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        elif path.suffix == f".{PICKLED}":
            torch.save({key: tensor.cpu() for key, tensor in tensors.items()}, temporary)
        else:
            raise ValueError(f"Weights are written to .{SAFE} or .{PICKLED} files, got {path}.")


def _shards(state: Mapping[str, Tensor], limit_bytes: int) -> Iterator[list[str]]:
    """Keys in their order, cut where a shard would grow over the limit; a larger tensor has a shard to itself."""
    keys: list[str] = []
    size = 0
    for key, tensor in state.items():
        if keys and size + tensor.nbytes > limit_bytes:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor.nbytes
    yield keys


def _num_bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size must be bytes or a size such as '10GB' or '512MiB', got {size!r}.")
    return int(float(match[1]) * _UNITS[match[2]])


def some(names: Sequence[str] | set[str], limit: int = 3) -> str:
    """At most a few of many names, in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
