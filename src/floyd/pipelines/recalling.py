"""A pipeline's memory of the texts it has read."""

from __future__ import annotations

import os
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from floyd.pipelines.timed import timed_encoder
from floyd.runtime.placement import Placement
from floyd.store.embeddings import EmbeddingFolder
from floyd.text.cache import Recall, TextCache

Where = str | os.PathLike[str] | TextCache | None


def text_cache(where: Where) -> TextCache | None:
    """ "memory", a folder's path, a cache to share, or None for none."""
    if where is None or isinstance(where, TextCache):
        return where
    if not isinstance(where, str | os.PathLike) or not os.fspath(where):
        raise TypeError(f"text_cache must be 'memory', a folder's path, a TextCache or None, got {where!r}.")
    return TextCache() if where == "memory" else TextCache(EmbeddingFolder(where))


class Lent:
    """A text encoder that is brought to where it computes once it is needed, and taken back at the end of the block.

    Without a cache it is needed at once, unless nothing `is_read`: then not at all.
    """

    def __init__(
        self, placement: Placement, encoder: Any, cache: TextCache | None, *, is_steady: bool, is_read: bool
    ) -> None:
        self.placement, self.encoder, self.is_read = placement, encoder, is_read
        self.recall = None if cache is None else Recall(cache, self.bring, is_steady)
        self._stack = ExitStack()
        self._is_here = False

    def __enter__(self) -> Self:
        if self.recall is None and self.is_read:
            self.bring()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def bring(self) -> Any:
        if not self._is_here:
            device = self.placement.device_of(self.encoder)
            self.encoder = timed_encoder(self._stack.enter_context(self.placement.use(self.encoder)), device)
            self._is_here = True
        return self.encoder
