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
def counted() -> Iterator[tuple[Live, Counter]]:
    """Attention as fused kernels have it: no table of scores is ever held."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Live() as live:
        counter = Counter(flops)
        with mock.patch.object(F, "scaled_dot_product_attention", counter.fused):
            yield live, counter


class Counter:
    """Operations, those of attention among them."""

    def __init__(self, flops: FlopCounterMode) -> None:
        self.others, self.of_attention = flops, 0

    def fused(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.of_attention += 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        return torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)

    @property
    def total(self) -> int:
        return self.others.get_total_flops() + self.of_attention
