"""What a component's weights are, without reading them: names, shapes and precisions from the heads of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from floyd.errors import CheckpointError
from floyd.store import layout, weights
from floyd.store.files import read_json
from floyd.store.naming import SAFE

_MAX_HEAD_BYTES = 100_000_000  # the format's own limit


class Stored(NamedTuple):
    """A tensor as a file has it."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int


def stored(
    folder: Path, component: str, *, variant: str | None = None, use_safetensors: bool | None = None
) -> list[Stored] | None:
    """The tensors of a component with weights, None of one without. `variant` as `from_pretrained` takes it: where it
    is missing, the plain files count."""
    kind = layout.read_index(folder).components.get(component)
    path = folder / component
    if kind is None or not layout.has_weights(kind):
        return None
    used = weights.available(path, variant=variant, use_safetensors=use_safetensors)
    found = weights.find(path, variant=used, use_safetensors=use_safetensors)
    return [tensor for file in weights.files_of(path, found) for tensor in head(file)]


def config_of(folder: Path, component: str) -> dict[str, Any]:
    return read_json(folder / component / "config.json")


def head(path: Path) -> list[Stored]:
    """Of a safetensors file the table at its beginning; of a pickle its tensors without their content."""
    if path.suffix != f".{SAFE}":
        with torch.device("meta"):
            state = torch.load(path, map_location="meta", weights_only=True)
        return [Stored(name, tuple(t.shape), t.nbytes) for name, t in state.items() if isinstance(t, torch.Tensor)]
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _MAX_HEAD_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file: its head would have {length} bytes.")
        try:
            table = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} is not a safetensors file: its head is no JSON ({error}).") from error
    return [
        Stored(name, tuple(row["shape"]), row["data_offsets"][1] - row["data_offsets"][0])
        for name, row in table.items()
        if name != "__metadata__"
    ]
