"""The clock books every moment once, whatever happens between its turns."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Generator, Iterator
from itertools import count
from typing import Any

import pytest
import torch

from floyd.runtime import clock as clocks
from floyd.runtime.clock import Clock, Place, begun, ended, in_part, is_watched, part, passed_on, tick, work


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """A clock's second passes whenever it is looked at; the call tells how many have."""
    seconds = count()
    latest = [0]

    def look() -> float:
        latest[0] = next(seconds)
        return float(latest[0])

    monkeypatch.setattr(clocks, "perf_counter", look)
    yield lambda: latest[0]
    assert not is_watched(), "a test left a clock behind"


def booked(clock: Clock) -> dict[str, float]:
    return {f"{place.stage} {place.part}": row.seconds for place, row in clock.rows.items()}


def whole(clock: Clock) -> float:
    return clock.outside_s + sum(row.seconds for row in clock.rows.values())


def test_every_moment_is_booked_once_on_the_innermost_part(now: Callable[[], int]) -> None:
    clock = begun()
    with part("other", stage="one"):
        with part("unet"):
            pass
        with part("sampler"), part("unet"):
            pass
    ended(clock)
    assert booked(clock) == {"one other": 3, "one unet": 2, "one sampler": 2}
    assert clock.outside_s == 2
    assert whole(clock) == now()


def test_without_a_clock_nothing_is_wrapped() -> None:
    def function() -> None:
        """Made during a call."""

    assert in_part("unet")(function) is function
    assert part("unet", stage="one") is part("sampler", stage="two")
    tick()
    work(1.0, None)  # type: ignore[arg-type]


def test_a_part_belongs_to_the_stage_under_way(now: Callable[[], int]) -> None:
    clock = begun()
    with part("other", stage="one"), part("text", stage="a class"):
        pass
    with part("text", stage="a class"):
        pass
    with part("transfers"):  # of nobody: the caller's
        pass
    ended(clock)
    assert set(clock.rows) == {Place("one", "other"), Place("one", "text"), Place("a class", "text")}


def test_parts_are_counted_and_ticks_count_within_them(now: Callable[[], int]) -> None:
    clock = begun()
    with part("sampler", stage="one", count=0):
        for _ in range(3):
            tick()
            with part("unet"):
                pass
    ended(clock)
    assert [(place.part, row.count) for place, row in clock.rows.items()] == [("sampler", 3), ("unet", 3)]
    assert clock.rows[Place("one", "unet")].laps == [1, 1, 1]
    assert clock.rows[Place("one", "sampler")].laps == [4 / 3]


def test_an_exception_leaves_the_clock_where_it_was(now: Callable[[], int]) -> None:
    clock = begun()
    with part("other", stage="one"):
        with pytest.raises(KeyError), part("unet"):
            raise KeyError
        with part("sampler"):
            pass
    assert clock.current is None
    ended(clock)
    assert booked(clock) == {"one other": 3, "one unet": 1, "one sampler": 1}


def test_what_a_reader_does_between_events_is_outside(now: Callable[[], int]) -> None:
    def events() -> Generator[int]:
        with part("other", stage="one"):
            yield from range(3)

    clock = begun()
    for _ in passed_on(events()):
        assert clock.current is None
    ended(clock)
    assert booked(clock) == {"one other": 4}
    assert clock.outside_s == 5
    assert whole(clock) == now()


def test_iterators_that_take_turns_keep_their_places(now: Callable[[], int]) -> None:
    seen = []

    def events(stage: str) -> Generator[int]:
        with part("other", stage=stage):
            for i in range(2):
                assert clock.current is not None
                seen.append(clock.current.place.stage)
                yield i

    clock = begun()
    for _ in zip(passed_on(events("one")), passed_on(events("two")), strict=False):
        assert clock.current is None
    ended(clock)
    assert seen == ["one", "two", "one", "two"]
    assert whole(clock) == now()


def test_an_iterator_may_end_after_the_clock(now: Callable[[], int]) -> None:
    def events() -> Generator[int]:
        with part("other", stage="one"):
            yield from range(3)

    clock = begun()
    iterator = passed_on(events())
    next(iterator)
    ended(clock)
    before = whole(clock)
    assert before == now()
    assert list(iterator) == [1, 2]
    assert whole(clock) == before


def test_a_clock_within_a_clock_hands_on_what_it_booked(now: Callable[[], int]) -> None:
    outer = begun()
    with part("other", stage="one"):
        inner = begun()
        with part("unet", stage="two"):
            pass
        ended(inner)
    ended(outer)
    assert booked(inner) == {"two unet": 1}
    assert inner.outside_s == 2
    assert booked(outer) == {"one other": 4, "two unet": 1}
    assert (outer.outside_s, whole(outer)) == (2, now())


def test_another_thread_is_not_watched(now: Callable[[], int]) -> None:
    """Not even one that was handed the context."""
    found: list[bool] = []
    clock = begun()
    for target in (is_watched, lambda: contextvars.copy_context().run(is_watched)):
        thread = threading.Thread(target=lambda look=target: found.append(look()))
        thread.start()
        thread.join()
    asyncio.run(_looked(found))
    ended(clock)
    assert found == [False, False, False]


async def _looked(found: list[bool]) -> None:
    found.append(await asyncio.to_thread(is_watched))


def test_an_iterator_that_goes_on_in_another_thread_is_no_longer_watched(now: Callable[[], int]) -> None:
    def events() -> Generator[int]:
        with part("other", stage="one"):
            yield from range(3)

    clock = begun()
    iterator = passed_on(events())
    next(iterator)
    rest: list[Any] = []
    thread = threading.Thread(target=lambda: rest.extend(iterator))
    thread.start()
    thread.join()
    assert rest == [1, 2]
    ended(clock)
    assert booked(clock) == {"one other": 1}
    assert whole(clock) == now()


def test_two_threads_watch_themselves() -> None:
    meet = threading.Barrier(2)
    found: dict[str, Clock] = {}

    def watch(stage: str) -> None:
        found[stage] = begun()
        meet.wait(timeout=10)
        with part("unet", stage=stage):
            meet.wait(timeout=10)
        ended(found[stage])

    threads = [threading.Thread(target=watch, args=(stage,)) for stage in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {stage: [place.stage for place in clock.rows] for stage, clock in found.items()} == {
        "one": ["one"], "two": ["two"],
    }  # fmt: skip


def test_an_accelerator_is_waited_for_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the ones that work for a stage, and never the CPU."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    card = torch.device("cuda", 1)
    clock = begun()
    with part("text", stage="one"):
        pass
    assert waited == []
    with part("other", stage="one", devices=[card, torch.device("cpu")]), part("unet"):
        assert waited == [card] * 2
    assert waited == [card] * 4
    ended(clock)
    assert waited == [card] * 5
    with part("other", stage="one", devices=[card]):
        pass
    assert waited == [card] * 5
