"""Shapes and sizes from the heads of files, whatever their kind, and nothing read but the head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from floyd.errors import CheckpointError
from floyd.store.headers import Stored, head, stored

STATE = {"a.weight": torch.zeros(3, 4, dtype=torch.float16), "b": torch.zeros(2)}
EXPECTED = {Stored("a.weight", (3, 4), 24), Stored("b", (2,), 8)}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    unet = tmp_path / "unet"
    unet.mkdir()
    kinds = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "IFPipeline", **kinds}))
    save_file(STATE, unet / "diffusion_pytorch_model.safetensors")
    return tmp_path


def test_both_kinds_of_files_tell_the_same(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors", metadata={"format": "pt"})
    torch.save(STATE, tmp_path / "a.bin")
    assert set(head(tmp_path / "a.safetensors")) == set(head(tmp_path / "a.bin")) == EXPECTED


def test_a_file_cut_off_after_its_head_is_told_as_well(pipeline: Path) -> None:
    """What is behind the head is never looked at."""
    path = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    assert set(stored(pipeline, "unet") or ()) == EXPECTED


def test_the_variant_counts_where_there_is_one(pipeline: Path) -> None:
    save_file({"b": torch.zeros(5)}, pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert stored(pipeline, "unet", variant="fp16") == [Stored("b", (5,), 20)]
    assert set(stored(pipeline, "unet", variant="other") or ()) == EXPECTED
    assert stored(pipeline, "scheduler") is None


@pytest.mark.parametrize("content", [b"\xff" * 16, (4).to_bytes(8, "little") + b"{{{{"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        head(tmp_path / "a.safetensors")
