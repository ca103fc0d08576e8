"""One size decides what every stage of a chain paints."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floyd.pipelines.sizes import planned, shown

IF = {"stage_1": 64, "stage_2": 256, "stage_3": 1024}
FOUR = {"stage_3": 4}


def plan(size: Any) -> list[tuple[int, int]]:
    return list(planned(size, IF, FOUR).values())


@pytest.mark.parametrize(("size", "wanted"), [
    (None, [(64, 64), (256, 256), (1024, 1024)]),
    (1024, [(64, 64), (256, 256), (1024, 1024)]),
    (256, [(64, 64), (256, 256)]),
    (64, [(64, 64)]),
    ((1536, 1024), [(96, 64), (384, 256), (1536, 1024)]),
    ((384, 256), [(96, 64), (384, 256)]),
    ((96, 64), [(96, 64)]),
    ([64, 96], [(64, 96)]),
    ((280, 200), [(70, 50), (280, 200)]),
    ((70, 50), [(70, 50)]),
    ((1000, 700), [(62, 44), (250, 175), (1000, 700)]),
    ((512, 512), [(32, 32), (128, 128), (512, 512)]),
    ((1, 1), [(1, 1)]),
])  # fmt: skip
def test_a_size_becomes_one_for_each_stage(size: Any, wanted: list[tuple[int, int]]) -> None:
    assert plan(size) == wanted


@given(width=st.integers(1, 4096), height=st.integers(1, 4096))
def test_every_pair_is_painted_to_the_pixel_or_refused_with_one_that_is(width: int, height: int) -> None:
    try:
        painted = plan((width, height))
    except ValueError as error:
        assert width % 4 or height % 4
        near = str(error).split("multiples of 4. ")[1].split(" would")[0]
        assert plan(tuple(int(side) for side in near.split("x")))[-1] == tuple(map(int, near.split("x")))
        assert all(abs(int(a) - b) < 4 for a, b in zip(near.split("x"), (width, height), strict=True))
        return
    assert painted[-1] == (width, height)
    for small, large in pairwise(painted):
        assert all(abs(4 * a - b) <= 2 or a == 1 for a, b in zip(small, large, strict=True))


def test_a_chain_of_other_factors_keeps_to_them() -> None:
    sizes = {"stage_1": 48, "stage_2": 96, "stage_3": 384}
    assert list(planned((101, 75), sizes, FOUR).values()) == [(50, 38), (101, 75)]
    assert list(planned((500, 400), sizes, {}).values()) == [(62, 50), (125, 100), (500, 400)]


@pytest.mark.parametrize(("size", "said"), [
    (100, r"size must be one of 64, 256, 1024.* or a pair of \(width, height\); got 100"),
    (True, "one of 64"),
    ("64x64", "one of 64"),
    (64.5, "one of 64"),
    ((64,), "a pair"),
    ((64, 64, 64), "a pair"),
    ((0, 64), r"The width of size must be a number of pixels in \[1, 16384\], an int; got 0"),
    ((64, -1), "The height of size"),
    ((64, True), "The height of size"),
    ((64.0, 64), "The width of size"),
    ((20000, 64), "The width of size"),
    ((5000, 100), "stage_1 would have to paint 5000x100, and a side may have 4096 px"),
    ((16384, 300), "stage_2 would have to paint 16384x300"),
    ((1001, 700), "stage_3 enlarges 4 times.* multiples of 4. 1000x700 would do"),
])  # fmt: skip
def test_a_size_that_cannot_be_made_is_refused_with_what_can(size: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(size)


def test_a_square_is_shown_by_its_side() -> None:
    assert [shown((64, 64)), shown((96, 64))] == ["64 px", "96x64 px"]
