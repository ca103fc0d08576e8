from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from floyd.store.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "model.safetensors").write_bytes(b"weights")
    (folder / "model_index.json").write_text("{}")
    return folder


def test_it_is_the_hash_of_all_names_and_contents(folder: Path) -> None:
    lines = [
        f"{name}\0{sha256(content).hexdigest()}\n"
        for name, content in (("model_index.json", b"{}"), ("unet/model.safetensors", b"weights"))
    ]
    assert fingerprint(folder) == f"sha256:{sha256(''.join(lines).encode()).hexdigest()}"


@pytest.mark.parametrize("change", ["content", "name", "more", "less"])
def test_it_changes_with_every_file(folder: Path, change: str) -> None:
    before, weights = fingerprint(folder), folder / "unet" / "model.safetensors"
    if change == "content":
        weights.write_bytes(b"Weights")
    elif change == "name":
        weights.rename(folder / "unet" / "other.safetensors")
    elif change == "more":
        (folder / "config.json").write_text("{}")
    else:
        weights.unlink()
    assert fingerprint(folder) != before


def test_it_does_not_depend_on_where_the_folder_lies_or_on_notes_beside_the_weights(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "README.md").write_text("Read me.")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state.json").write_text("{}")
    assert fingerprint(folder.rename(folder.with_name("elsewhere"))) == before


def test_a_repository_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text('{"_class_name": "IFPipeline"}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("floyd.store.hub.Source.cache", tmp_path)
    assert fingerprint("org/name") == f"commit:{commit}"


def test_what_is_neither_a_folder_nor_an_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        fingerprint(tmp_path / "nowhere")
