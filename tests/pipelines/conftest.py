"""One set of tiny checkpoints for the room: built and saved by the incumbent, loaded by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests import tiny

from floyd.pipelines.base import DiffusionPipeline
from floyd.runtime.switches import Switches


@pytest.fixture(scope="session")
def theirs() -> dict[str, Any]:
    """The incumbent's pipelines: stage I with T5 and safety modules, stage II without, stage III."""
    pipelines = {
        "one": tiny.stage_one(with_safety=True),
        "two": tiny.stage_two(with_safety=True),
        "three": tiny.upscaler(),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


@pytest.fixture(scope="session")
def folders(theirs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the incumbent saved them."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny.save(pipeline, root / name) for name, pipeline in theirs.items()}


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: DiffusionPipeline.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture
def ours(loaded: dict[str, Any], pytestconfig: pytest.Config) -> dict[str, Any]:
    """Ours, from the same files; each test gets its own pipelines over shared components. `--switches` sets theirs."""
    pipelines = {}
    for name, pipeline in loaded.items():
        values = {value: pipeline.config[value] for value in pipeline.value_names}
        pipelines[name] = type(pipeline)(**pipeline.components, **values)
        pipelines[name].set_progress_bar_config(disable=True)
        if (switch := pytestconfig.getoption("--switches")) is not None:
            whole = {"off": Switches.off(), "on": Switches.on()}
            pipelines[name].switches = whole.get(switch) or Switches(**{"read_once": True, switch: True})
    return pipelines


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """Neither square nor of a handy size."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (40, 52, 3), dtype=np.uint8))
