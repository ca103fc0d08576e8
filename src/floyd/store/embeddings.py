"""A folder of embeddings: one small file for each, named by what decides its content.

Any number of processes may write into it: a file appears whole or not at all, and equal names have equal content. A
file that is damaged counts as absent, and is replaced.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from floyd.errors import CheckpointError
from floyd.store.files import made
from floyd.store.lazy import of_files
from floyd.store.naming import SAFE
from floyd.store.weights import read_metadata, write_file

log = logging.getLogger(__name__)


class EmbeddingFolder:
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = made(folder)

    def path_of(self, key: str) -> Path:
        return self.folder / f"{sha256(key.encode()).hexdigest()}.{SAFE}"

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors that were put there under this key, and no others."""
        path = self.path_of(key)
        if not path.is_file():
            return None
        try:
            if read_metadata(path).get("key") != key:
                raise CheckpointError(f"{path} is of another text or encoder.")
            state = of_files([path])
            content = {name: state[name] for name in state}
            if _digest(content) != read_metadata(path).get("sha256"):
                raise CheckpointError(f"{path} has changed since it was written.")
        except (CheckpointError, OSError) as error:
            log.warning("A stored embedding cannot be used, the text is read again: %s", error)
            return None
        return content

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        metadata = {"key": key, "sha256": _digest(tensors)}
        try:
            write_file(tensors, self.path_of(key), metadata=metadata)
        except OSError as error:  # a full disk is no reason not to paint
            log.warning("An embedding could not be stored in %s: %s", self.folder, error)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    whole = sha256()
    for name in sorted(tensors):
        whole.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
