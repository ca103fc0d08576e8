"""Where pictures and their captions lie: a folder of files, or tar files of a web dataset.

A folder tells captions by metadata.jsonl, by a .txt beside each picture, or by the name of the folder that a picture is
in. A shard (.tar) holds files of one stem, such as 0001.jpg with 0001.txt or 0001.json. Nothing is decoded here.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")  # of metadata.jsonl, and of a shard's .json


@dataclass(frozen=True)
class Item:
    """A picture's file, or its stretch of a shard, and what was found to be said of it."""

    name: str  # for complaints
    path: Path
    caption: str | None
    offset: int | None = None
    size: int | None = None

    def content(self) -> bytes:
        if self.offset is None or self.size is None:
            return self.path.read_bytes()
        with self.path.open("rb") as shard:
            shard.seek(self.offset)
            return shard.read(self.size)


def found(data: str | Path) -> list[Item]:
    """All pictures, in the order of their names. Sources that cannot be read as a whole are refused."""
    shards = shards_of(data)
    if shards:
        items = [item for shard in shards for item in _of_shard(shard)]
    else:
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"data must be a folder of pictures, a folder of .tar shards, or shards such as "
                f"'set-{{000..009}}.tar'; {str(data)!r} is none of these."
            )
        items = list(_of_folder(folder))
    if not items:
        raise ValueError(f"{data} holds no pictures: none of its files ends in {', '.join(SUFFIXES)}.")
    return items


# ------------------------------------------------------------------------------------------------------------- folders


def _of_folder(folder: Path) -> Iterator[Item]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES)
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if (folder / METADATA).is_file():
        yield from _told(folder, files)
        return
    for path in files:
        name = path.relative_to(folder)
        beside = path.with_suffix(".txt")
        caption = beside.read_text(encoding="utf-8").strip() if beside.is_file() else None
        if caption is None and name.parent.name:
            caption = re.sub(r"[-_]+", " ", name.parent.name)
        yield Item(name.as_posix(), path, caption or None)


def _told(folder: Path, files: list[Path]) -> Iterator[Item]:
    """As metadata.jsonl has it: a line for each picture, {"file_name": ..., "text": ...}."""
    captions: dict[str, str | None] = {}
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = _row(line, f"{folder / METADATA}, line {number}")
        name = row.get("file_name")
        if not isinstance(name, str):
            raise ValueError(f'{folder / METADATA}, line {number} has no "file_name".')
        if name in captions:
            raise ValueError(f"{folder / METADATA}, line {number} names {name} a second time.")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / METADATA}, line {number} names {name}, which is not there.")
        captions[name] = _caption(row)
    for path in files:
        name = path.relative_to(folder).as_posix()
        yield Item(name, path, captions.get(name))


def _row(text: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be an object, got a {type(row).__name__}.")
    return row


def _caption(row: Mapping[str, Any]) -> str | None:
    """The first of the usual keys that says something."""
    told = (row.get(key) for key in CAPTION_KEYS)
    return next((text.strip() for text in told if isinstance(text, str) and text.strip()), None)


# -------------------------------------------------------------------------------------------------------------- shards


def shards_of(data: str | Path) -> list[Path]:
    """The tar files that are meant; none where this is a folder of pictures."""
    if Path(data).expanduser().is_dir():
        return sorted(Path(data).expanduser().glob("*.tar"))
    paths = [Path(name).expanduser() for name in braced(str(data))]
    if not all(path.suffix == ".tar" for path in paths):
        return []
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ValueError(
            f"There is no shard {missing[0]}" + (f" (nor {len(missing) - 1} others)." * (len(missing) > 1))
        )
    return paths


def braced(pattern: str) -> list[str]:
    """Every name that a pattern such as `set-{000..011}.tar` or `{a,b}.tar` stands for."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    options = [[part] if i % 2 == 0 else _braces(part) for i, part in enumerate(parts)]
    return ["".join(each) for each in product(*options)]


def _braces(inside: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = match.groups()
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return inside.split(",")


def _of_shard(shard: Path) -> Iterator[Item]:
    """The pictures of one tar file, read later at their offsets: it must not be compressed."""
    pictures: dict[str, tuple[str, int, int]] = {}
    captions: dict[str, str | None] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                    continue
                stem, kind = _split(member.name)
                if kind in SUFFIXES:
                    pictures[stem] = (member.name, member.offset_data, member.size)
                elif kind == ".txt":
                    captions[stem] = _content(archive, member).decode("utf-8").strip() or None
                elif kind == ".json" and captions.get(stem) is None:
                    captions[stem] = _caption(
                        _row(_content(archive, member).decode("utf-8"), f"{shard}: {member.name}")
                    )
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a plain tar file ({error}): unpack it if it is compressed.") from error
    for stem, (name, offset, size) in pictures.items():
        yield Item(f"{shard.name}:{name}", shard, captions.get(stem), offset, size)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "a file has content"
    return file.read()


def _split(name: str) -> tuple[str, str]:
    """A web dataset's key ends at the first dot of the file's name."""
    path = PurePosixPath(name)
    stem, _, kind = path.name.partition(".")
    return str(path.with_name(stem)), f".{kind.lower()}"
