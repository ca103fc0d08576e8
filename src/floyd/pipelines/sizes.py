"""One size for a whole chain: which stages run, and how large each one paints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from floyd.pipelines.options import MAX_SIDE, check_size

Size = int | tuple[int, int]
Sides = tuple[int, int]  # width, height


def planned(size: Any, sides: Mapping[str, int], factors: Mapping[str, int]) -> dict[str, Sides]:
    """What each stage that runs paints, (width, height), for a picture of this size.

    `sides` are what the stages paint by themselves, `factors` how many times those enlarge that know only one way.
    None is all stages, a number one of `sides`. A pair is the width and height of the picture that comes out last; the
    chain ends with the stage whose own side has the ratio nearest to 1 to the short one.
    """
    if size is None:
        return {name: (side, side) for name, side in sides.items()}
    if not isinstance(size, tuple | list):
        return _up_to(size, sides)
    if len(size) != 2:
        raise ValueError(f"{_allowed(sides)}; got {size!r}.")
    for name, side in zip(("width", "height"), size, strict=True):
        check_size(f"The {name} of size", side, MAX_SIDE * max(factors.values(), default=1))
    names = _names(size, sides)
    planned = {names[-1]: (size[0], size[1])}
    for lower, upper in reversed(list(pairwise(names))):
        planned[lower] = _below(planned[upper], upper, factors.get(upper), sides[lower] / sides[upper])
    for name, painted in planned.items():
        if max(painted) > MAX_SIDE * factors.get(name, 1):
            raise ValueError(
                f"size {size[0]}x{size[1]} cannot be made: {name} would have to paint {painted[0]}x{painted[1]}, and a "
                f"side may have {MAX_SIDE * factors.get(name, 1)} px at most."
            )
    return {name: planned[name] for name in names}


def reaches(side: int, size: Any) -> bool:
    """Whether no stage after one that paints `side` runs for this size. False for what is no size."""
    if isinstance(size, tuple | list):
        return len(size) == 2 and all(isinstance(length, int) for length in size) and min(size) <= side
    return bool(size == side)


def shown(sides: Sides) -> str:
    """64 px if it is a square, or 96x64 px."""
    width, height = sides
    return f"{width} px" if width == height else f"{width}x{height} px"


def _up_to(size: Any, sides: Mapping[str, int]) -> dict[str, Sides]:
    reached: dict[str, Sides] = {}
    for name, side in sides.items():
        reached[name] = (side, side)
        if side == size and not isinstance(size, bool):
            return reached
    raise ValueError(f"{_allowed(sides)}; got {size!r}.")


def _allowed(sides: Mapping[str, int]) -> str:
    row = ", ".join(str(side) for side in sides.values())
    return f"size must be one of {row}, the sides that this cascade's stages paint, or a pair of (width, height)"


def _names(size: Sequence[Any], sides: Mapping[str, int]) -> list[str]:
    """The stages that run: up to the one whose own side is the fewest doublings away, the larger of two alike."""
    away = {name: abs(math.log2(min(size) / side)) for name, side in sides.items()}
    last = max(name for name in sides if away[name] == min(away.values()))
    names = list(sides)
    return names[: names.index(last) + 1]


def _below(above: Sides, name: str, factor: int | None, ratio: float) -> Sides:
    """What the stage before is to paint."""
    if factor is None:
        width, height = (max(1, round(side * ratio)) for side in above)
        return width, height
    if any(side % factor for side in above):
        near = "x".join(str(max(1, round(side / factor)) * factor) for side in above)
        raise ValueError(
            f"size {above[0]}x{above[1]} cannot be made: {name} enlarges {factor} times, so its sides are multiples of "
            f"{factor}. {near} would do."
        )
    return above[0] // factor, above[1] // factor
