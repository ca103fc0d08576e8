"""A folder of embeddings gives back what was put there, or nothing."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from floyd.store.embeddings import EmbeddingFolder

KEY = '{"tokens": [1, 2]}'
TENSORS = {"rows": torch.arange(6.0).view(2, 3).to(torch.bfloat16), "counts": torch.tensor([4, 1])}


def test_what_is_put_is_got_in_another_process_too(tmp_path: Path) -> None:
    EmbeddingFolder(tmp_path / "a" / "b").put(KEY, TENSORS)
    found = EmbeddingFolder(tmp_path / "a" / "b").get(KEY)
    assert found is not None
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert EmbeddingFolder(tmp_path / "a" / "b").get("another") is None


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "other key", "folder"])
def test_damaged_files_count_as_absent_and_are_replaced(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = EmbeddingFolder(tmp_path)
    folder.put(KEY, TENSORS)
    path = folder.path_of(KEY)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-3])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("hello, this is no embedding at all")
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "other key":
        save_file(load_file(path), path, {"key": "{}"})
    else:
        path.unlink()
        path.mkdir()
    assert folder.get(KEY) is None
    if damage != "folder":
        assert "is read again" in caplog.text
        folder.put(KEY, TENSORS)
        assert folder.get(KEY) is not None


def test_a_disk_that_takes_nothing_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    folder = EmbeddingFolder(tmp_path)
    monkeypatch.setattr("floyd.store.embeddings.write_file", full)
    folder.put(KEY, TENSORS)
    assert "could not be stored" in caplog.text
    assert list(tmp_path.iterdir()) == []


def _write(folder: Path) -> None:
    for _ in range(20):
        EmbeddingFolder(folder).put(KEY, TENSORS)


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=_write, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if EmbeddingFolder(tmp_path).path_of(KEY).exists():
            assert EmbeddingFolder(tmp_path).get(KEY) is not None
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == [EmbeddingFolder(tmp_path).path_of(KEY).name]
