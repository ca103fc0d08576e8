"""How many bytes a computation holds at once and how many operations it makes, without doing it: on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Live(TorchDispatchMode):
    """Counts the storages that come to be under it, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes and key not in given:
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@contextmanager
def counted() -> Iterator[tuple[Live, FlopCounterMode]]:
    """Attention as fused kernels have it: no table of scores, and not counted among the operations."""
    fused = mock.patch.object(F, "scaled_dot_product_attention", _fused)
    with torch.no_grad(), fused, FlopCounterMode(display=False) as flops, Live() as live:
        yield live, flops


def _fused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
