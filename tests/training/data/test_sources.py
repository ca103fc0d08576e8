from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from floyd.training.data.sources import braced, found, shards_of


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode())


def told(items: list) -> dict[str, str | None]:
    return {item.name: item.caption for item in items}


def shard(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_text_file_beside_a_picture_is_its_caption(tmp_path: Path) -> None:
    touch(tmp_path / "b.png", tmp_path / "a.JPG", tmp_path / "notes.md")
    (tmp_path / "a.txt").write_text(" a cat \n", encoding="utf-8")
    assert told(found(tmp_path)) == {"a.JPG": "a cat", "b.png": None}


def test_the_name_of_the_folder_is_the_caption_where_nothing_else_is(tmp_path: Path) -> None:
    touch(tmp_path / "red_circle" / "0.png", tmp_path / "red_circle" / "1.png", tmp_path / "2.png")
    (tmp_path / "red_circle" / "1.txt").write_text("another")
    assert told(found(tmp_path)) == {"2.png": None, "red_circle/0.png": "red circle", "red_circle/1.png": "another"}


def test_metadata_tells_captions_by_any_of_the_usual_keys(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "deep" / "b.png", tmp_path / "c.png")
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "deep/b.png", "caption": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert told(found(tmp_path)) == {"a.png": "one", "c.png": None, "deep/b.png": "two"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 must be an object, got a list"),
        ('{"text": "x"}', 'line 1 has no "file_name"'),
        ('{"file_name": "z.png", "text": "x"}', "line 1 names z.png, which is not there"),
        ('{"file_name": "a.png"}\n{"file_name": "a.png"}', "line 2 names a.png a second time"),
    ],
)
def test_metadata_that_cannot_be_right_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    touch(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        found(tmp_path)


def test_hidden_files_and_folders_are_no_data(tmp_path: Path) -> None:
    touch(tmp_path / ".thumbs" / "a.png", tmp_path / "b.png", tmp_path / ".c.png")
    assert list(told(found(tmp_path))) == ["b.png"]


def test_a_shard_is_read_at_its_offsets(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "set-0.tar",
        {
            "x/0001.png": b"first picture",
            "x/0001.txt": b" a cat\n",
            "x/0002.json": b'{"caption": "a dog"}',
            "x/0002.jpg": b"second",
            "x/0003.png": b"third",
        },
    )
    items = found(path)
    assert [(item.caption, item.content()) for item in items] == [
        ("a cat", b"first picture"),
        ("a dog", b"second"),
        (None, b"third"),
    ]
    assert items[0].name == "set-0.tar:x/0001.png"


def test_several_shards_are_a_folder_or_a_pattern(tmp_path: Path) -> None:
    for name in ("set-08.tar", "set-09.tar", "set-10.tar"):
        shard(tmp_path / name, {f"{name}.png": b"p", f"{name[:6]}.txt": b"t"})
    assert [path.name for path in shards_of(tmp_path)] == ["set-08.tar", "set-09.tar", "set-10.tar"]
    assert [path.name for path in shards_of(f"{tmp_path}/set-{{08..09}}.tar")] == ["set-08.tar", "set-09.tar"]
    with pytest.raises(ValueError, match=r"There is no shard .*set-11\.tar \(nor 1 others\)"):
        shards_of(f"{tmp_path}/set-{{10..12}}.tar")


def test_a_pattern_counts_with_leading_zeros_and_lists() -> None:
    assert braced("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert braced("{x,y}-{1..2}.tar") == ["x-1.tar", "x-2.tar", "y-1.tar", "y-2.tar"]
    assert braced("plain.tar") == ["plain.tar"]


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "set.tar", {"0.png": b"x" * 1000}, "w:gz")
    with pytest.raises(ValueError, match=r"set\.tar is not a plain tar file"):
        found(path)


def test_a_folder_without_pictures_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pictures"):
        found(tmp_path)
    with pytest.raises(ValueError, match="data must be a folder of pictures"):
        found(tmp_path / "nowhere")
