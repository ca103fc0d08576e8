"""Which file of a folder or a repository is the LoRA, and what lies in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from floyd.adapters.factors import Factors, LoraFile
from floyd.adapters.keys import COMPONENTS
from floyd.errors import CheckpointError
from floyd.store import hub, weights
from floyd.store.files import made, read_json
from floyd.store.source import Source

SAFE_NAME, PICKLED_NAME = "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"
_USUAL = (SAFE_NAME, "adapter_model.safetensors", PICKLED_NAME, "adapter_model.bin")
_PEFT_CONFIG = "adapter_config.json"
_METADATA_KEY = "lora_adapter_metadata"  # of the incumbent: peft's configurations, their keys prefixed by component


def opened(
    given: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **asking: Any,
) -> LoraFile:
    """The LoRA in a file, a folder, a repository of the hub or a state dict. `asking` is for the hub."""
    if isinstance(given, Mapping):
        return LoraFile(dict(given))
    path = Path(given).expanduser()
    if path.is_file():
        if weight_name is not None or subfolder is not None:
            raise ValueError(f"{path} is a file; weight_name and subfolder are for folders and repositories.")
        return _read(path, path.parent / _PEFT_CONFIG if path.stem == "adapter_model" else None)
    _stays_inside("weight_name", weight_name)
    _stays_inside("subfolder", subfolder)
    source = Source(given, **asking)
    there = hub.names_in(source, subfolder)
    name = weight_name or _chosen(there, _place(source, subfolder), use_safetensors)
    inside = f"{subfolder}/" if subfolder else ""
    told = hub.file(source, inside + _PEFT_CONFIG) if _PEFT_CONFIG in there and name.startswith("adapter_") else None
    return _read(hub.file(source, inside + name), told)


def write(
    layers: Mapping[str, Mapping[str, Factors]],
    path: Path,
    configs: Mapping[str, Mapping[str, Any]],
    save: Callable[[dict[str, Tensor], str], Any] | None = None,
) -> None:
    """PEFT's keys under the component's name.

    `configs` of peft are told beside, which only safetensors have room for. A component without one has its alpha in
    the weights, so that every reader gets the same network.
    """
    state: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for component, own in layers.items():
        config = configs.get(component, {})
        if config and any(factors.alpha != factors.rank for factors in own.values()):
            raise ValueError(
                f"The layers of {component} have an alpha, and so has its metadata: leave one of them out."
            )
        told |= {f"{component}.{key}": value for key, value in config.items()}
        state |= {f"{component}.{key}": tensor for key, tensor in state_of(own).items()}
    path = made(path.parent) / path.name
    if save is not None:
        save(state, os.fspath(path))
        return
    metadata = {_METADATA_KEY: json.dumps(told, indent=2, sort_keys=True, default=_plain)} if told else {}
    weights.write_file(state, path, metadata=metadata)


def state_of(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors under PEFT's keys, with alpha in them."""
    state = {}
    for path, factors in layers.items():
        baked = factors.baked()
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = baked.down, baked.up
    return state


def _plain(value: Any) -> Any:
    """What JSON has no word for in a `LoraConfig`."""
    return sorted(value) if isinstance(value, set) else str(value)


def _read(path: Path, peft_config: Path | None) -> LoraFile:
    configs: dict[str | None, Mapping[str, Any]] = {}
    if peft_config is not None and peft_config.is_file():
        configs[None] = read_json(peft_config)
    elif path.suffix == ".safetensors":
        configs = _told(path, weights.read_metadata(path))
    return LoraFile(weights.read_file(path), str(path), configs)


def _told(path: Path, metadata: Mapping[str, str]) -> dict[str | None, Mapping[str, Any]]:
    try:
        told = json.loads(metadata.get(_METADATA_KEY, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {_METADATA_KEY} in its header is not JSON: {error}") from error
    if not isinstance(told, dict):
        raise CheckpointError(f"{path}: {_METADATA_KEY} in its header must be an object, got {type(told).__name__}.")
    configs: dict[str | None, dict[str, Any]] = {}
    for key, value in told.items():
        component, dot, name = key.partition(".")
        if dot and component in COMPONENTS:
            configs.setdefault(component, {})[name] = value
        else:
            configs.setdefault(None, {})[key] = value
    return dict(configs)


def _chosen(names: Sequence[str], place: str, use_safetensors: bool | None) -> str:
    """The usual name, or the only file that could be meant."""
    suffixes = {None: (".safetensors", ".bin"), True: (".safetensors",), False: (".bin", ".pt")}[use_safetensors]
    there = [name for name in names if name.endswith(suffixes)]
    usual = [name for name in _USUAL if name in there]
    safe = [name for name in there if name.endswith(".safetensors")]
    found = usual[:1] or safe or there
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{place} has no LoRA file: expected {SAFE_NAME}, or name it with weight_name=...")
    raise ValueError(
        f"{place} has several files that may be meant: {weights.some(found)}; name one with weight_name=..."
    )


def _place(source: Source, subfolder: str | None) -> str:
    return f"{source.id}/{subfolder}" if subfolder else source.id


def _stays_inside(name: str, value: str | None) -> None:
    if value is not None and (not value or Path(value).is_absolute() or ".." in Path(value).parts):
        raise ValueError(f"{name} must be a name inside the folder or the repository, got {value!r}.")
