"""T5's reading of every caption, once: kept on disk, so that T5 need not be in memory while a stage is trained.

All 77 positions are kept: IF's networks read those of the padding, too. Equal captions are read once. A file holds the
states of some captions under the digests of their texts; which encoder made them is the name of its folder.

L text tokens  E encoder width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from floyd.store.files import made
from floyd.store.weights import read_file, write_file

PER_FILE = 64
Embed = Callable[[list[str]], Tensor]  # texts, cleaned -> [B, L, E]


class Embeddings:
    """Texts that were read before, and what came out."""

    def __init__(self, folder: Path, encoder: str) -> None:
        """`encoder`: a fingerprint; what another one has read is not found."""
        self._folder = folder / sha256(encoder.encode()).hexdigest()[:16]
        self._states: dict[str, Tensor] = {}
        for file in sorted(self._folder.glob("*.safetensors")) if self._folder.is_dir() else []:
            self._states |= read_file(file)

    def __len__(self) -> int:
        return len(self._states)

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The different ones that have yet to be read."""
        return [text for text in dict.fromkeys(texts) if _key(text) not in self._states]

    def read(self, texts: Sequence[str], embed: Embed, *, at_once: int = 16) -> Iterator[int]:
        """Read the missing ones, yielding how many that were after each batch; what is done is on disk at once."""
        missing = self.missing(texts)
        for start in range(0, len(missing), PER_FILE):
            part = missing[start : start + PER_FILE]
            fresh: dict[str, Tensor] = {}
            for first in range(0, len(part), at_once):
                some = part[first : first + at_once]
                for text, states_LE in zip(some, embed(some), strict=True):
                    fresh[_key(text)] = states_LE.detach().cpu().clone()
                yield len(some)
            name = sha256("".join(fresh).encode()).hexdigest()[:16]
            write_file(fresh, made(self._folder) / f"{name}.safetensors")
            self._states |= fresh

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[B, L, E]"""
        return torch.stack([self._states[_key(text)] for text in texts])


def _key(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]
