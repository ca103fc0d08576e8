"""Which checkpoint it was: a short text that changes when a file of it does."""

from __future__ import annotations

import os
from hashlib import file_digest, sha256
from pathlib import Path

from floyd.store.hub import Source, snapshot

_KINDS = (".json", ".txt", ".model", ".safetensors", ".bin")  # configurations, vocabularies, weights


def fingerprint(path_or_id: str | os.PathLike[str]) -> str:
    """`sha256:...` of a file, or over the names and contents of a folder's; `commit:...` of a cached repository."""
    if Path(path_or_id).is_file():
        return f"sha256:{_digest(Path(path_or_id))}"
    folder = Source(path_or_id).folder()
    if folder is None:
        return f"commit:{snapshot(path_or_id, components=[], local_files_only=True).name}"
    whole = sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _KINDS and p.is_file()):
        name = path.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            whole.update(f"{name.as_posix()}\0{_digest(path)}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
