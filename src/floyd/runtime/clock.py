"""Where the time of a call went: one clock, turned from place to place.

A place is a part of the work of a stage. The clock is always at one of them, or outside, so that what it books adds up
to all the time there was. Work on an accelerator is waited for at each turn. Nobody is watched unless a clock runs in
the same thread: `part` is then one look at a context variable, and `in_part` returns the function it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from threading import get_ident
from time import perf_counter, process_time
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from floyd.runtime.rates import Arithmetic

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E")


class Place(NamedTuple):
    stage: str
    part: str


@dataclass(eq=False)
class Row:
    """What is booked on a place."""

    seconds: float = 0.0
    count: int = 0
    laps: list[float] = field(default_factory=list)  # seconds of one of the `count`, for each span that ended
    work: dict[Arithmetic, float] = field(default_factory=dict)

    def add(self, other: Row) -> None:
        self.seconds += other.seconds
        self.count += other.count
        self.laps += other.laps
        for arithmetic, flops in other.work.items():
            self.work[arithmetic] = self.work.get(arithmetic, 0.0) + flops


class Clock:
    """One opening of a profile, in the thread that opened it; a clock within a clock stops the outer one meanwhile."""

    def __init__(self, parent: Clock | None) -> None:
        self.parent, self.owner = parent, get_ident()
        self.rows: dict[Place, Row] = {}
        self.outside_s = 0.0
        self.current: _Span | None = None
        self.devices: set[torch.device] = set() if parent is None else set(parent.devices)
        self.is_running = True
        self.cpu_s = -process_time()  # until it is stopped
        self.last = self._now() if parent is None else parent.turn(parent.current)
        if parent is not None:
            parent.is_running = False

    def turn(self, to: _Span | None) -> float:
        """The time up to now is where the clock was, that from now on is at `to`."""
        if get_ident() != self.owner:  # an iterator that went on in another thread
            return self.last
        if self.is_running:
            now = self._now()
            self._book(now - self.last)
            self.last = now
        self.current = to
        return self.last

    def stop(self) -> None:
        now = self.turn(self.current)
        self.is_running = False
        self.cpu_s += process_time()
        if self.parent is not None:
            self.parent.absorb(self, now)

    def absorb(self, inner: Clock, now: float) -> None:
        for place, row in inner.rows.items():
            self.row(place).add(row)
        self._book(inner.outside_s)
        self.last, self.is_running = now, True

    def row(self, place: Place) -> Row:
        return self.rows.setdefault(place, Row())

    def _book(self, seconds: float) -> None:
        if self.current is None:
            self.outside_s += seconds
        else:
            self.current.seconds += seconds
            self.row(self.current.place).seconds += seconds

    def _now(self) -> float:
        for device in self.devices:
            torch.accelerator.synchronize(device)
        return perf_counter()


_CLOCK: ContextVar[Clock | None] = ContextVar("floyd_clock", default=None)


def begun() -> Clock:
    """A clock for this thread, until it is `ended`."""
    clock = Clock(_clock())
    _CLOCK.set(clock)
    return clock


def ended(clock: Clock) -> None:
    clock.stop()
    if _CLOCK.get() is clock:
        _CLOCK.set(clock.parent)


def _clock() -> Clock | None:
    """The one that watches this thread; a context may be handed to another thread, a clock may not."""
    clock = _CLOCK.get()
    return clock if clock is not None and clock.owner == get_ident() else None


class _Span:
    """A stay at a place. Whoever leaves it turns the clock back to where it was, unless it went on from here."""

    def __init__(self, clock: Clock, place: Place, count: int) -> None:
        self.clock, self.place, self.count = clock, place, count
        self.seconds = 0.0
        self.before: _Span | None = None

    def __enter__(self) -> None:
        self.before = self.clock.current
        self.clock.turn(self)

    def __exit__(self, *error: object) -> None:
        if self.clock.current is self:
            self.clock.turn(self.before)
        if self.count:
            row = self.clock.row(self.place)
            row.count += self.count
            row.laps.append(self.seconds / self.count)


class _Away:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.span: _Span | None = None

    def __enter__(self) -> None:
        self.span = self.clock.current
        self.clock.turn(None)

    def __exit__(self, *error: object) -> None:
        if self.clock.current is None:
            self.clock.turn(self.span)


_NOTHING = nullcontext()


def part(
    name: str, *, stage: str | None = None, devices: Collection[torch.device] = (), count: int = 1
) -> AbstractContextManager[None]:
    """The block's time is this part's, less that of parts within it.

    It belongs to the stage that is under way; where none is, to `stage`, or else to nobody. `count` 0 is for what
    counts by `tick`.
    """
    clock = _clock()
    if clock is None:
        return _NOTHING
    stage = stage if clock.current is None else clock.current.place.stage
    if stage is None:
        return _NOTHING
    if devices and (here := torch.accelerator.current_accelerator(check_available=True)):
        clock.devices.update(device for device in devices if device.type == here.type)
    return _Span(clock, Place(stage, name), count)


def _away() -> AbstractContextManager[None]:
    """For an iterator, around its `yield`: the block's time is the caller's."""
    clock = _clock()
    return _NOTHING if clock is None else _Away(clock)


def tick() -> None:
    """The part under way did what it does once more."""
    clock = _clock()
    if clock is not None and clock.current is not None:
        clock.current.count += 1


def work(flops: float, arithmetic: Arithmetic) -> None:
    """So much is computed in the part under way."""
    clock = _clock()
    if clock is not None and clock.current is not None:
        found = clock.row(clock.current.place).work
        found[arithmetic] = found.get(arithmetic, 0.0) + flops


def is_watched() -> bool:
    return _clock() is not None


def in_part(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a function that is made during a call: each call of it is a part. Where nobody watches it stays as it is."""

    def wrapped(function: Callable[P, R]) -> Callable[P, R]:
        if not is_watched():
            return function

        @wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with part(name):
                return function(*args, **kwargs)

        return inside

    return wrapped


def passed_on(events: Generator[E]) -> Generator[E]:
    """An iterator's events. What its reader does between two of them is no part of it."""
    with closing(events):
        for event in events:
            with _away():
                yield event
