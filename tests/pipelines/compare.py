"""The same call of floyd and of the incumbent."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

ATOL = 1e-3  # the promise: same weights, seed and float32 give the same picture


@contextmanager
def quietly() -> Iterator[None]:
    """The incumbent warns about its own documented use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def call_both(ours: Any, theirs: Any, *, seeds: int | list[int] = 0, **arguments: Any) -> tuple[Any, Any]:
    """The same call of both: each its own generators, and in the end those must have drawn the same."""
    mine, other = _generators(seeds), _generators(seeds)
    with quietly():
        theirs_out = theirs(generator=other, **arguments)
    ours_out = ours(generator=mine, **arguments)
    for a, b in zip(_listed(mine), _listed(other), strict=True):
        assert torch.equal(a.get_state(), b.get_state()), "the generators did not draw alike"
    return ours_out, theirs_out


def assert_same(mine: Any, other: Any, atol: float = ATOL) -> None:
    """Pictures of any kind, within the promise; PIL pictures within one level of 255."""
    if isinstance(mine, list):
        mine, other = (np.stack([np.asarray(image, dtype=np.float32) for image in images]) for images in (mine, other))
        atol = 1.0
    mine, other = (torch.as_tensor(np.asarray(x)) for x in (mine, other))
    assert mine.shape == other.shape
    torch.testing.assert_close(mine.float(), other.float(), atol=atol, rtol=0)
    assert mine.float().std() > 0.05, "a flat picture proves nothing"


def _generators(seeds: int | list[int]) -> Any:
    if isinstance(seeds, list):
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.Generator().manual_seed(seeds)


def _listed(generator: Any) -> list[torch.Generator]:
    return generator if isinstance(generator, list) else [generator]
