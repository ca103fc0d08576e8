"""How many CPU threads an operator may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Thread

import torch

_TELLING = Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """The calling thread's operators share their work with no other thread: how it is cut decides how it is rounded.

    Each thread keeps a number of its own, so calls at the same time go on with theirs. Only threads born later take
    the number that was told last; that one is put back at once.
    """
    with _TELLING:
        usual = torch.get_num_threads()
        if usual > 1:
            torch.set_num_threads(1)
            messenger = Thread(target=torch.set_num_threads, args=(usual,))
            messenger.start()
            messenger.join()
    try:
        yield
    finally:
        if usual > 1:
            torch.set_num_threads(usual)
