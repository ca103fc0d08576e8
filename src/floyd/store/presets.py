"""A cascade's root folder: `stage_1`, `stage_2`, `stage_3`, each a pipeline's folder, and `floyd.json` beside them.

floyd.json holds the arguments that a checkpoint wants its stages called with, by stage:

    {"stage_1": {"timesteps": "fast27", "guidance_scale": 5.0}, "stage_2": {"noise_level": 100}}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from floyd.errors import CheckpointError
from floyd.store.files import made, read_json, write_json
from floyd.store.layout import INDEX_NAME

PRESETS_NAME = "floyd.json"
STAGES = ("stage_1", "stage_2", "stage_3")


def is_cascade(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether this is a local folder of stages, and not a pipeline's."""
    folder = Path(path_or_id).expanduser()
    return folder.is_dir() and not (folder / INDEX_NAME).is_file()


def stage_folders(root: str | os.PathLike[str]) -> dict[str, Path]:
    """The pipelines' folders in a cascade's root, in their order. A stage may be absent, with those after it."""
    folder = Path(root).expanduser()
    found = {name: folder / name for name in STAGES if (folder / name / INDEX_NAME).is_file()}
    if not found or list(found) != list(STAGES[: len(found)]):
        has = ", ".join(found) or "none of them"
        raise CheckpointError(
            f"{folder} is neither a pipeline's folder ({INDEX_NAME}) nor a cascade's: that would hold "
            f"{', '.join(STAGES)} from the first one on, and this one holds {has}."
        )
    return found


def read_presets(root: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """How each stage wants to be called; nothing where the file is absent."""
    path = Path(root).expanduser() / PRESETS_NAME
    if not path.is_file():
        return {}
    presets = {name: value for name, value in read_json(path).items() if not name.startswith("_")}
    for name, value in presets.items():
        if name not in STAGES or not isinstance(value, dict):
            raise CheckpointError(f"{path} must map {', '.join(STAGES)} to objects, got {name!r}: {value!r}.")
    return presets


def write_presets(root: str | os.PathLike[str], presets: Mapping[str, Mapping[str, Any]]) -> None:
    content = {stage: _listed(options) for stage, options in presets.items()}
    write_json(made(root) / PRESETS_NAME, content)


def _listed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
