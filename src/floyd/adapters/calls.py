"""The strength of LoRA in one call, which no other call sees.

peft keeps a layer's strength on the layer, where every pipeline and thread that shares the network finds it. What one
call asks for is kept by its thread instead, and multiplied in where peft looks the strength up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Call(threading.local):
    def __init__(self) -> None:  # once in every thread; a compiled network watches attributes, not their defaults
        self.scale = 1.0


_CALL = _Call()


class CallScaled(dict[str, float]):
    """A layer's strengths by adapter, times what the present call asks for."""

    def __getitem__(self, name: str) -> float:
        return dict.__getitem__(self, name) * _CALL.scale


@contextmanager
def call_scale(scale: float) -> Iterator[None]:
    """Within the block, in this thread, every LoRA acts `scale` times as strongly."""
    before = _CALL.scale
    _CALL.scale = scale
    try:
        yield
    finally:
        _CALL.scale = before
