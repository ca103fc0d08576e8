"""A cascade's folder: stages, and how they want to be called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from floyd.errors import CheckpointError
from floyd.store.presets import is_cascade, read_presets, stage_folders, write_presets


def make(root: Path, *stages: str) -> Path:
    for stage in stages:
        (root / stage).mkdir(parents=True)
        (root / stage / "model_index.json").write_text("{}")
    return root


def test_stages_are_found_in_their_order(tmp_path: Path) -> None:
    make(tmp_path, "stage_2", "stage_1")
    assert stage_folders(tmp_path) == {"stage_1": tmp_path / "stage_1", "stage_2": tmp_path / "stage_2"}


@pytest.mark.parametrize("stages", [(), ("stage_2",), ("stage_1", "stage_3")])
def test_a_gap_is_an_error_that_says_what_is_there(tmp_path: Path, stages: tuple[str, ...]) -> None:
    make(tmp_path, *stages)
    with pytest.raises(CheckpointError, match=f"this one holds {', '.join(stages) or 'none of them'}"):
        stage_folders(tmp_path)


def test_a_pipelines_folder_and_a_hub_id_are_no_cascade(tmp_path: Path) -> None:
    make(tmp_path, "stage_1")
    assert is_cascade(tmp_path)
    assert not is_cascade(tmp_path / "stage_1")
    assert not is_cascade("DeepFloyd/IF-I-XL-v1.0")


def test_presets_survive_writing_and_reading(tmp_path: Path) -> None:
    assert read_presets(tmp_path) == {}
    write_presets(tmp_path, {"stage_1": {"timesteps": (9, 0), "guidance_scale": 5.0}})
    assert read_presets(tmp_path) == {"stage_1": {"timesteps": [9, 0], "guidance_scale": 5.0}}


@pytest.mark.parametrize("content", [{"stage_9": {}}, {"stage_1": 5}, []])
def test_a_file_that_is_no_presets_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / "floyd.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"floyd\.json"):
        read_presets(tmp_path)


def test_remarks_are_left_aside(tmp_path: Path) -> None:
    (tmp_path / "floyd.json").write_text(json.dumps({"_made_by": "floyd", "stage_1": {}}))
    assert read_presets(tmp_path) == {"stage_1": {}}
