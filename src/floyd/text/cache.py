"""Embeddings that were read once, kept: T5 need not run, nor be brought to the device, for a prompt it has read.

An entry is known by all that decides its bits: the tokens, how many there may be, and the encoder with its weights,
their precision and quantization. Whoever changes one of them reads anew.

B prompts  L tokens  E encoder width  R rows that differ from the one before them
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from floyd.text.identity import identity

MOST_BYTES = 2**28  # of entries in memory; the least recently used go first
VERSION = 1


@dataclass(frozen=True, eq=False)
class Packed:
    """The states of one prompt, equal neighbours once: far from the text many positions of the padding say the same.

    The network reads the padding too, so it cannot be left out; unpacked, every bit is as it was.
    """

    rows_RE: Tensor
    counts_R: Tensor

    @classmethod
    def of(cls, states_LE: Tensor) -> Packed:
        bits = states_LE.contiguous().view(torch.uint8)
        is_new = torch.ones(len(bits), dtype=torch.bool)
        is_new[1:] = (bits[1:] != bits[:-1]).any(1)
        starts = is_new.nonzero().flatten()
        counts = torch.diff(starts, append=torch.tensor([len(bits)]))
        return cls(states_LE[starts].clone(), counts)

    def unpacked(self) -> Tensor:
        return self.rows_RE.repeat_interleave(self.counts_R, dim=0)

    @property
    def nbytes(self) -> int:
        return self.rows_RE.nbytes + self.counts_R.nbytes


class Storage(Protocol):
    """Where entries outlive the process."""

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """What was put there; None for what is absent or damaged."""

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None: ...


class TextCache:
    """Entries in memory and, if there is a storage, also there. Threads may share it."""

    def __init__(self, storage: Storage | None = None, *, most_bytes: int = MOST_BYTES) -> None:
        self.storage = storage
        self.most_bytes = most_bytes
        self._entries: OrderedDict[str, Packed] = OrderedDict()
        self._lock = Lock()

    def get(self, key: str, num_tokens: int) -> Tensor | None:
        with self._lock:
            packed = self._entries.get(key)
            if packed is not None:
                self._entries.move_to_end(key)
        if packed is None and self.storage is not None:
            packed = _sound(self.storage.get(key), num_tokens)
            if packed is not None:
                self._remember(key, packed)
        return None if packed is None else packed.unpacked()

    def put(self, key: str, states_LE: Tensor) -> None:
        packed = Packed.of(states_LE)
        self._remember(key, packed)
        if self.storage is not None:
            self.storage.put(key, {"rows": packed.rows_RE, "counts": packed.counts_R})

    def clear(self) -> None:
        """Forget what is in memory; a storage keeps what it has."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _remember(self, key: str, packed: Packed) -> None:
        with self._lock:
            self._entries[key] = packed
            self._entries.move_to_end(key)
            while len(self._entries) > 1 and sum(entry.nbytes for entry in self._entries.values()) > self.most_bytes:
                self._entries.popitem(last=False)


@dataclass(frozen=True, eq=False)
class Recall:
    """How one call uses a cache."""

    cache: TextCache
    bring: Callable[[], Any]  # the encoder, where it computes: only if there is something to read
    is_steady: bool = False  # what is read so has the same bits on any number of threads: kept apart

    def states(
        self, encoder: Any, ids_BL: Tensor, mask_BL: Tensor, compute: Callable[[Tensor, Tensor], Tensor], **how: Any
    ) -> Tensor:
        """Every prompt is looked up; those that are not there are read one by one: no entry depends on others."""
        who = identity(encoder)
        if who is None:
            return compute(ids_BL, mask_BL)
        found: dict[str, Tensor] = {}
        keys = [self._key(who, ids_BL[i], mask_BL[i], how) for i in range(len(ids_BL))]
        for i, key in enumerate(keys):
            if key in found:
                continue
            states_LE = self.cache.get(key, ids_BL.shape[1])
            if states_LE is None:
                states_LE = compute(ids_BL[i : i + 1], mask_BL[i : i + 1])[0].cpu()
                self.cache.put(key, states_LE)
            found[key] = states_LE
        return torch.stack([found[key] for key in keys])

    def _key(self, who: str, ids_L: Tensor, mask_L: Tensor, how: Mapping[str, Any]) -> str:
        told = {
            "version": VERSION,
            "encoder": who,
            "tokens": ids_L[mask_L.bool()].tolist(),
            "length": len(ids_L),
            "padding": sorted({*ids_L[~mask_L.bool()].tolist()}),
            "steady": self.is_steady,
            **how,
        }
        return json.dumps(told, sort_keys=True)


def _sound(tensors: Mapping[str, Tensor] | None, num_tokens: int) -> Packed | None:
    """An entry that can be what was put there."""
    if tensors is None or set(tensors) != {"rows", "counts"}:
        return None
    rows_RE, counts_R = tensors["rows"], tensors["counts"]
    is_sound = (
        rows_RE.ndim == 2
        and rows_RE.is_floating_point()
        and counts_R.dtype == torch.int64
        and counts_R.shape == rows_RE.shape[:1]
        and bool((counts_R > 0).all())
        and int(counts_R.sum()) == num_tokens
        and bool(rows_RE.isfinite().all())
    )
    return Packed(rows_RE, counts_R) if is_sound else None
