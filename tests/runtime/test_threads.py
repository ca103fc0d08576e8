"""One thread for a while, here and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch

from floyd.runtime.threads import one_thread

T = TypeVar("T")


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def elsewhere(work: Callable[[], T]) -> T:
    """What the work says in a thread of its own."""
    said: list[T] = []
    thread = threading.Thread(target=lambda: said.append(work()))
    thread.start()
    thread.join()
    return said[0]


def test_operators_run_on_one_thread_for_as_long_as_the_block_lasts() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_a_failure_gives_the_threads_back() -> None:
    with pytest.raises(RuntimeError, match="stop"), one_thread():
        raise RuntimeError("stop")
    assert torch.get_num_threads() == 3


def test_other_threads_keep_theirs_even_if_they_are_born_in_between() -> None:
    go = threading.Event()
    numbers: list[int] = []

    def old() -> None:
        torch.zeros(1)
        go.wait(10)
        numbers.append(torch.get_num_threads())

    thread = threading.Thread(target=old)
    thread.start()
    with one_thread():
        go.set()
        thread.join()
        assert numbers == [3]
        assert elsewhere(torch.get_num_threads) == 3

        def nested() -> tuple[int, int]:
            with one_thread():
                inside = torch.get_num_threads()
            return inside, torch.get_num_threads()

        assert elsewhere(nested) == (1, 3)
    assert elsewhere(torch.get_num_threads) == 3
