"""How far it is: a bar with the time left on a terminal, now and then a line elsewhere, nothing if so wished."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from floyd.store.files import told_size

EVERY_S = 10.0  # between two lines


class Bars(Protocol):
    def start(self, label: str, total: int, done: int = 0) -> None:
        """What follows is `total` steps of this, of which some may have been made before."""

    def step(self, count: int = 1, note: str = "") -> None:
        """So many more were made."""

    def note(self, text: str) -> None:
        """Something happened on the way."""


@contextmanager
def progress(*, quiet: bool = False, in_bytes: bool = False) -> Iterator[Bars]:
    """On stderr: stdout is for results. A step is a byte if so said."""
    if quiet:
        yield _Silence()
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            *((DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield _Drawn(bar)
    else:
        yield _Lines(told_size if in_bytes else str)


class _Silence:
    def start(self, label: str, total: int, done: int = 0) -> None:
        """Not told."""

    def step(self, count: int = 1, note: str = "") -> None:
        """Not told."""

    def note(self, text: str) -> None:
        """Not told."""


class _Drawn:
    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task: Any = None

    def start(self, label: str, total: int, done: int = 0) -> None:
        self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def step(self, count: int = 1, note: str = "") -> None:
        self._bar.update(self._task, advance=count, note=note)

    def note(self, text: str) -> None:
        self._bar.update(self._task, note=text)


class _Lines:
    def __init__(self, told: Callable[[int], str]) -> None:
        self._number = told
        self._label, self._total, self._before, self._done = "", 0, 0, 0
        self._begun = self._told = time.monotonic()

    def start(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._before, self._done = label, total, done, done
        self._begun = self._told = time.monotonic()

    def step(self, count: int = 1, note: str = "") -> None:
        self._done += count
        now = time.monotonic()
        spent_s, made, left = now - self._begun, self._done - self._before, self._total - self._done
        if left > 0 and now - self._told < EVERY_S:
            return
        self._told = now
        rest = f"{_clock(spent_s / made * left)} left" if made > 0 else "begun"
        ending = rest if left > 0 else f"in {_clock(spent_s)}"
        note = f"  {note}" if note else ""
        reached = f"{self._number(self._done)}/{self._number(self._total)}"
        print(f"{self._label}: {reached}, {ending}{note}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"{self._label}: {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
