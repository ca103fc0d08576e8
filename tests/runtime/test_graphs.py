"""A replay reads what it is given now, and what comes out is the caller's to keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from floyd.runtime.graphs import Graphed, Recording


class Tape:
    """Records as CUDA does: what is replayed is the work on the same memory, and its result lies where it lay."""

    def __init__(self) -> None:
        self.num_recordings = 0

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        self.num_recordings += 1
        out = torch.zeros_like(work())  # a recording computes nothing

        def replay() -> None:
            out.copy_(work())

        return Recording(replay, out)


def weighted(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


def test_every_call_computes_with_its_own_arguments() -> None:
    tape = Tape()
    graphed = Graphed(weighted, tape)
    outs = [graphed(torch.full((2,), float(i)), torch.tensor([1.0, 10.0])) for i in range(4)]
    assert [out.tolist() for out in outs] == [[0, 0], [1, 10], [2, 20], [3, 30]]
    assert tape.num_recordings == 1


def test_the_first_call_is_an_ordinary_one() -> None:
    tape = Tape()
    Graphed(weighted, tape)(torch.ones(2), torch.ones(2))
    assert tape.num_recordings == 0


def test_another_shape_or_precision_is_recorded_anew() -> None:
    tape = Tape()
    graphed = Graphed(weighted, tape)
    for x in (torch.ones(2), torch.ones(2), torch.ones(3), torch.ones(3), torch.ones(3).double(), torch.ones(2)):
        assert torch.equal(graphed(x, torch.ones(1)), x)
    assert tape.num_recordings == 2


def test_arguments_are_left_as_they_are() -> None:
    graphed, x = Graphed(weighted, Tape()), torch.ones(2)
    for _ in range(3):
        graphed(x, torch.tensor(5.0))
    assert x.tolist() == [1, 1]


@pytest.mark.gpu
def test_a_cuda_graph_replays_a_network() -> None:
    layer = torch.nn.Conv2d(3, 8, 3, padding=1).cuda()
    graphed = Graphed(lambda x: layer(x).relu())
    with torch.no_grad():
        for _ in range(4):
            x_BCHW = torch.randn(2, 3, 16, 16, device="cuda")
            torch.testing.assert_close(graphed(x_BCHW), layer(x_BCHW).relu())
