"""What lies in the hub's cache on this machine: which pipelines, in which variants, and whether they are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from floyd.errors import CheckpointError
from floyd.store import layout, naming
from floyd.store.layout import INDEX_NAME, ModelIndex, read_index
from floyd.store.source import Source

PLAIN = "plain"  # the files without a variant


@dataclass(frozen=True)
class CachedPipeline:
    """A repository that holds a pipeline, as far as it is here."""

    id: str
    class_name: str
    commit: str
    num_bytes: int
    unfinished_bytes: int
    lacking: dict[str, tuple[str, ...]]  # by variant: the components whose files are not all here

    @property
    def whole(self) -> list[str]:
        """The variants that can be loaded with nothing left out."""
        return [variant for variant, lacking in self.lacking.items() if not lacking]


def cache_root() -> Path:
    """Where the hub's cache is."""
    return Source("any/one").cache_root


def used_bytes(root: Path) -> int:
    """By everything in the cache, floyd's or not."""
    return sum(_sizes(folder / "blobs")[0] for folder in _repositories(root))


def cached_pipelines(root: Path) -> list[CachedPipeline]:
    """The repositories in the cache that hold a pipeline, by name."""
    return [found for folder in _repositories(root) if (found := _described(folder)) is not None]


def has_token() -> bool:
    """Whether one would be sent to the hub. The token itself goes nowhere."""
    from huggingface_hub import get_token

    return bool(get_token())


def _repositories(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("models--*--*") if path.is_dir())


def _described(folder: Path) -> CachedPipeline | None:
    snapshot = _latest(folder)
    if snapshot is None or not (snapshot / INDEX_NAME).is_file():
        return None
    try:
        index = read_index(snapshot)
    except CheckpointError:
        return None  # of a library that floyd does not know
    num_bytes, unfinished = _sizes(folder / "blobs")
    return CachedPipeline(
        id=folder.name.removeprefix("models--").replace("--", "/", 1),
        class_name=index.class_name,
        commit=snapshot.name,
        num_bytes=num_bytes,
        unfinished_bytes=unfinished,
        lacking=dict(_lacking(snapshot, index)),
    )


def _latest(folder: Path) -> Path | None:
    """The commit that `main` is at, or else the one that came last."""
    main = folder / "refs" / "main"
    if main.is_file() and (named := folder / "snapshots" / main.read_text().strip()).is_dir():
        return named
    return max((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime, default=None)


def _lacking(snapshot: Path, index: ModelIndex) -> Iterator[tuple[str, tuple[str, ...]]]:
    """For each variant of which there is something: what `from_pretrained` would miss."""
    files = {name: _files(snapshot / name) for name, kind in index.components.items() if kind is not None}
    weighty = {n for n, kind in index.components.items() if kind is not None and layout.has_weights(kind)}
    variants: list[str | None] = [*sorted({variant for own in files.values() for variant in naming.variants(own)})]
    if not variants or naming.choose(files.get("unet", ()), variant=None, use_safetensors=None):
        variants.insert(0, None)  # small networks come in plain files whatever the variant; the large one tells
    for variant in variants:
        lacking = [name for name, own in files.items() if not _is_whole(own, variant, with_weights=name in weighty)]
        yield variant or PLAIN, tuple(lacking)


def _is_whole(names: list[str], variant: str | None, *, with_weights: bool) -> bool:
    """Whether a component's folder has what it takes; plain weights will do for any variant."""
    if not with_weights:
        return bool(names)
    sets = [naming.choose(names, variant=each, use_safetensors=None) for each in (variant, None)]
    return "config.json" in names and any(found is not None and not found.num_missing for found in sets)


def _files(folder: Path) -> list[str]:
    """The names whose content is here, too."""
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _sizes(blobs: Path) -> tuple[int, int]:
    """In bytes: whole files, and what unfinished downloads left."""
    whole = unfinished = 0
    if blobs.is_dir():
        for entry in os.scandir(blobs):
            if entry.name.endswith(".incomplete"):
                unfinished += entry.stat().st_size
            elif entry.is_file():
                whole += entry.stat().st_size
    return whole, unfinished
