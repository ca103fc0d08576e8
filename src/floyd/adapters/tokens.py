"""The file of textual inversion: the learned embedding of each new token under the token's name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from floyd.errors import CheckpointError
from floyd.store import hub
from floyd.store.files import made
from floyd.store.source import Source
from floyd.store.weights import read_file, write_file

FILE_NAME = "learned_embeds.safetensors"


def read_rows(
    given: str | os.PathLike[str] | Mapping[str, Tensor], *, token: str | None = None, weight_name: str = FILE_NAME
) -> dict[str, Tensor]:
    """The embeddings of a file, of a folder or repository of the hub that holds `weight_name`, or of a state dict.

    By token; `token` renames the only one.
    """
    if isinstance(given, Mapping):
        rows, place = dict(given), "the state dict"
    else:
        path = Path(given).expanduser()
        path = path if path.is_file() else hub.file(Source(given), weight_name)
        rows, place = read_file(path), str(path)
    if token is not None:
        if len(rows) != 1:
            raise ValueError(f"token renames a single embedding, and {place} holds {len(rows)}.")
        rows = {token: next(iter(rows.values()))}
    flat = {name: row.reshape(-1) if row.ndim == 2 and len(row) == 1 else row for name, row in rows.items()}
    if wrong := [name for name, row in flat.items() if row.ndim != 1 or not row.is_floating_point()]:
        raise CheckpointError(f"{place} must hold one row of numbers for each token; {', '.join(wrong)} is not that.")
    return flat


def write_rows(rows: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> Path:
    """As the incumbent's safetensors have it: the token is the key."""
    path = made(folder) / FILE_NAME
    write_file({token: row.detach().float().cpu() for token, row in rows.items()}, path)
    return path
