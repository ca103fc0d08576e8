"""Tensors that are read one at a time are those that safetensors reads, and broken files are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from floyd.errors import CheckpointError
from floyd.store import lazy, weights

KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.int8, torch.int64]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {f"{kind}": (torch.randn(3, 5) * 9).to(kind) for kind in KINDS}
    state |= {"nothing": torch.zeros(0, 4), "number": torch.tensor(3.5), "yes": torch.tensor([True, False])}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("is_mapped", [False, True])
def test_every_kind_of_tensor_is_read(file: Path, is_mapped: bool) -> None:
    ours, theirs = lazy.of_files([file], is_mapped=is_mapped), weights.read_file(file)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape)
        assert ours[key].tolist() == tensor.tolist()
        assert (ours.lying[key].shape, ours.lying[key].nbytes) == (tuple(tensor.shape), tensor.nbytes)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_what_was_read_belongs_to_who_read_it(file: Path, is_mapped: bool) -> None:
    state = lazy.of_files([file], is_mapped=is_mapped)
    state["torch.float32"].zero_()
    assert state["torch.float32"].any()
    file.unlink()
    with pytest.raises(FileNotFoundError):
        state["torch.float32"]


def test_shards_are_read_in_their_order(tmp_path: Path) -> None:
    state = {f"layer.{i}": torch.full((10,), float(i)) for i in range(12)}
    weights.write(state, tmp_path, base="model", max_shard_size=100)
    whole = lazy.opened(tmp_path)
    assert isinstance(whole, lazy.LazyState)
    assert set(whole) == set(state)
    assert len({lying.path for lying in whole.lying.values()}) > 3
    assert all(torch.equal(whole[key], state[key]) for key in state)


def test_pickles_are_read_at_once(tmp_path: Path) -> None:
    weights.write({"a": torch.ones(2)}, tmp_path, base="model", safe_serialization=False)
    assert torch.equal(lazy.opened(tmp_path)["a"], torch.ones(2))


def test_renaming_reads_nothing(file: Path) -> None:
    state = lazy.of_files([file])
    renamed = lazy.Renamed(state, {"x": "number"})
    assert (list(renamed), len(renamed), float(renamed["x"])) == (["x"], 1, 3.5)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no sensible length"),
        (b"\xff" * 40, "no sensible length"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ((2).to_bytes(8, "little") + b"[]", "is not a safetensors file"),
        (
            (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}      ',
            "not that of its",
        ),
        ((60).to_bytes(8, "little") + b'{"a":{"dtype":"X32","shape":[1],"data_offsets":[0,4]}}      ', "type X32"),
    ],
)
def test_broken_files_are_told(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        lazy.of_files([path])


def test_a_file_that_ends_early_is_told(file: Path) -> None:
    state = lazy.of_files([file])
    with file.open("rb+") as handle:
        handle.truncate(state.lying["torch.float64"].start + 8)
    with pytest.raises(CheckpointError, match="is cut off"):
        state["torch.float64"]


def test_a_tensor_in_two_shards_is_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"number": torch.tensor(1.0)}, other)
    with pytest.raises(CheckpointError, match="repeats number"):
        lazy.of_files([file, other])


def test_to_ask_what_there_is_and_how_large_reads_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(lying: lazy.Lying) -> torch.Tensor:
        raise AssertionError("read")

    monkeypatch.setattr(lazy.Lying, "read", read)
    state = lazy.of_files([file])
    renamed = lazy.Renamed(state, {"mine": "number", "other": "torch.float32"})
    assert "number" in state
    assert "mine" not in state
    assert "mine" in renamed
    assert "number" not in renamed
    assert (lazy.shape_of(renamed, "other"), lazy.shape_of(renamed, "mine")) == ((3, 5), ())
    with pytest.raises(AssertionError, match="read"):
        renamed["mine"]
    assert lazy.shape_of({"a": torch.ones(2, 3)}, "a") == (2, 3)
