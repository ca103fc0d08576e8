"""Where a checkpoint comes from: a folder, or a repository and how to ask the hub for it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from floyd.store.layout import INDEX_NAME

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from: a folder, or a repository and how to ask the hub for it."""

    path_or_id: str | os.PathLike[str]
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False

    def folder(self) -> Path | None:
        """The local folder, or None for an id of the hub. ValueError for what is neither."""
        path = Path(self.path_or_id).expanduser()
        if path.is_dir():
            return path
        if path.is_file():
            raise ValueError(f"{path} is a file; give the folder that holds config.json or {INDEX_NAME}.")
        if not _ID.fullmatch(os.fspath(self.path_or_id)):
            raise ValueError(f"{self.path_or_id!s} is neither an existing folder nor a hub id of the form 'org/name'.")
        return None

    @property
    def cache(self) -> Path | None:
        return None if self.cache_dir is None else Path(self.cache_dir)

    @property
    def cache_root(self) -> Path:
        """The hub's cache that this source is kept in, given or the machine's own."""
        from huggingface_hub import constants

        return Path(self.cache or constants.HF_HUB_CACHE).expanduser().resolve()

    @property
    def is_offline(self) -> bool:
        from huggingface_hub import constants

        return self.local_files_only or bool(constants.HF_HUB_OFFLINE)

    @property
    def id(self) -> str:
        return os.fspath(self.path_or_id)

    def __repr__(self) -> str:  # the token stays out of logs
        return f"Source({self.id!r}, revision={self.revision!r})"
