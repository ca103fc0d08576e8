"""The state of a training run on disk: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from floyd.errors import CheckpointError


def write_snapshot(state: dict[str, Any], path: Path) -> None:
    """Tensors, numbers, strings and containers of them; the old snapshot stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def read_snapshot(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a readable training snapshot ({error}); delete it to start anew."
        ) from error
