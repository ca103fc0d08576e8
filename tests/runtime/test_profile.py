"""What a profile says of what its clock booked."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch

from floyd.runtime import clock as clocks
from floyd.runtime import profile as profiles
from floyd.runtime.clock import is_watched, part, tick, work
from floyd.runtime.profile import PARTS, Profile
from floyd.runtime.rates import Arithmetic, Rate

FLOAT = Arithmetic(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes at every look at the clock, and the machine computes four operations a second."""
    seconds = count()
    monkeypatch.setattr(clocks, "perf_counter", lambda: float(next(seconds)))
    work_s = count()
    monkeypatch.setattr(clocks, "process_time", lambda: 0.5 * next(work_s))
    monkeypatch.setattr(profiles, "measured", lambda arithmetic: Rate(arithmetic, 4.0, 1))


def painted() -> None:
    """Two steps."""
    with part("other", stage="stage_1", count=0), part("sampler", count=0):
        for _ in range(2):
            tick()
            with part("unet"):
                work(1.0, FLOAT)


def test_the_table_has_every_part_its_share_and_its_floor() -> None:
    with Profile() as profile:
        painted()
    assert str(profile) == profile.table()
    assert profile.table().splitlines() == [
        "                 count  seconds    share  ms each   floor",
        "stage_1        2 steps    7.000   77.8 %   2500.0",
        "  UNet, steps        2    2.000   22.2 %   1000.0  25.0 %",
        "  sampler            2    3.000   33.3 %   1500.0",
        "  other                   2.000   22.2 %",
        "outside                   2.000   22.2 %",
        "all                       9.000  100.0 %",
        "the processor worked 0.500 s of it for this process",
        "floor: how much of the time the arithmetic alone would take, at what was measured right after",
        "  0 GFLOP/s in float32 on cpu, 1 thread",
    ]


def test_the_same_as_numbers() -> None:
    with Profile() as profile:
        painted()
    told = json.loads(json.dumps(profile.to_json()))
    assert told["seconds"] == 9
    assert (told["outside_s"], told["cpu_s"]) == (2, 0.5)
    assert told["stages"] == {"stage_1": {"seconds": 7, "steps": 2, "step_s": 2.5}}
    assert told["parts"][0] == {
        "stage": "stage_1", "part": "unet", "seconds": 2, "count": 2, "median_s": 1, "flops": 2, "floor_s": 0.5,
        "share": 2 / 9,
    }  # fmt: skip
    assert told["rates"] == [{"device": "cpu", "dtype": "float32", "flops_per_s": 4, "threads": 1}]
    assert sum(row["share"] for row in told["parts"]) + told["outside_s"] / told["seconds"] == pytest.approx(1)


def test_blocks_add_up() -> None:
    profile = Profile()
    for _ in range(2):
        with profile:
            painted()
    assert (profile.seconds, profile.cpu_s, profile.stages["stage_1"].steps) == (18, 1, 4)


def test_a_profile_within_a_profile_is_part_of_it() -> None:
    with Profile() as outer:
        painted()
        with Profile() as inner:
            painted()
    assert inner.stages["stage_1"].steps == 2
    assert outer.stages["stage_1"].steps == 4
    assert outer.seconds > inner.seconds


def test_an_open_profile_is_not_opened_again() -> None:
    profile = Profile()
    with profile, pytest.raises(RuntimeError, match="open already"), profile:
        pass
    assert not is_watched()


def test_an_exception_leaves_no_trace_but_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "measured", None)  # nothing is measured on the way out of an error
    profile = Profile()

    def failing() -> None:
        with profile, part("unet", stage="stage_1"):
            work(1.0, FLOAT)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert not is_watched()
    assert [row.part for row in profile.parts] == ["unet"]
    assert "floor:" not in profile.table()


def test_without_a_floor_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "measured", None)
    with Profile(floor=False) as profile:
        painted()
    assert all(row.floor_s is None for row in profile.parts)
    assert profile.to_json()["rates"] == []


def test_a_rate_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(profiles, "measured", lambda arithmetic: asked.append(arithmetic) or Rate(arithmetic, 1.0, 1))
    profile = Profile()
    for _ in range(2):
        with profile:
            painted()
    assert asked == [FLOAT]


def test_an_empty_block_is_all_outside() -> None:
    with Profile() as profile:
        pass
    assert profile.parts == []
    assert profile.table().splitlines()[-2].split() == ["all", "1.000", "100.0", "%"]
    assert Profile().table().splitlines()[-2].split() == ["all", "0.000", "0.0", "%"]


def test_parts_come_in_the_order_of_a_call() -> None:
    with Profile(floor=False) as profile:
        for name in reversed(PARTS):
            with part(name, stage="stage_1"):
                pass
    assert [row.part for row in profile.parts] == list(PARTS)
