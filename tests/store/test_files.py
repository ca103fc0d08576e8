from __future__ import annotations

from pathlib import Path

import pytest

from floyd.errors import CheckpointError
from floyd.store.files import made, read_json, replacing, told_size, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})

    def interrupted() -> None:
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "complaint"), [("{", "cannot be read as JSON"), ("[1]", "must hold a JSON object")]
)
def test_broken_json_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"config\.json {complaint}"):
        read_json(tmp_path / "config.json")


def test_a_checkpoint_is_not_saved_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match="is a file"):
        made(tmp_path / "taken")
    assert made(tmp_path / "new" / "deep").is_dir()


@pytest.mark.parametrize(
    ("num_bytes", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (8_609_000_000, "8.61 GB"), (999_600, "1 MB")],
)
def test_sizes_are_told_as_the_hub_tells_them(num_bytes: int, told: str) -> None:
    assert told_size(num_bytes) == told
