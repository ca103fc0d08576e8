"""A step of the network as a CUDA graph: one launch where there were a thousand.

A graph reads and writes the same memory at every replay. So arguments are copied to places that stay, and what comes
out is copied from there; everything else that the recorded work touches must lie still and keep its meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Recording(NamedTuple):
    replay: Callable[[], None]
    out: Tensor  # where every replay leaves its result


class Recorder(Protocol):
    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        """Run work so that it can be replayed."""


def cuda_recorder(work: Callable[[], Tensor]) -> Recording:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # nothing is computed yet: kernels are only written down
        out = work()
    return Recording(graph.replay, out)


def can_record(like: Tensor) -> bool:
    """Whether work on such tensors can be recorded."""
    return like.is_cuda


class Graphed:
    """A function of tensors that is recorded the second time it is called, and replayed from then on.

    The first call is an ordinary one: libraries choose their kernels then, which a recording forbids. Arguments of
    other shapes begin anew.
    """

    def __init__(self, function: Callable[..., Tensor], recorder: Recorder = cuda_recorder) -> None:
        self.function, self.recorder = function, recorder
        self.shapes: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self.places: list[Tensor] = []
        self.recording: Recording | None = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        shapes = [(x.shape, x.dtype, x.device) for x in arguments]
        if shapes != self.shapes:
            self.shapes, self.recording = shapes, None
            return self.function(*arguments)
        if self.recording is None:
            self.places = [x.clone() for x in arguments]
            self.recording = self.recorder(lambda: self.function(*self.places))
        for place, x in zip(self.places, arguments, strict=True):
            place.copy_(x)
        self.recording.replay()
        return self.recording.out.clone()
