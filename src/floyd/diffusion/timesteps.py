"""Which of the training timesteps a sampler visits, noisiest first."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One move of the sampler, from noise level `t` down to `t_prev` (-1: clean)."""

    index: int
    t: int
    t_prev: int

    @property
    def is_last(self) -> bool:
        return self.t_prev < 0


def leading(count: int, num_train: int = 1000, *, steps_offset: int = 0) -> tuple[int, ...]:
    """Whole strides up from `steps_offset`; never reaches the noisiest timestep (arXiv:2305.08891, table 2)."""
    stride = num_train // _checked_count(count, num_train)
    return checked([i * stride + steps_offset for i in reversed(range(count))], num_train)


def linspace(count: int, num_train: int = 1000) -> tuple[int, ...]:
    """Evenly spaced with both ends included; a single timestep is 0."""
    gap = (num_train - 1) / max(_checked_count(count, num_train) - 1, 1)
    return checked([round(i * gap) for i in reversed(range(count))], num_train)


def trailing(count: int, num_train: int = 1000) -> tuple[int, ...]:
    """Strides down from the noisiest timestep (arXiv:2305.08891, table 2)."""
    gap = num_train - (num_train - num_train / _checked_count(count, num_train))  # so rounded, halves fall as numpy's
    return checked([round(num_train - i * gap) - 1 for i in range(count)], num_train)


def spaced(count: int, num_train: int = 1000, *, spacing: str = "leading", steps_offset: int = 0) -> tuple[int, ...]:
    """`count` timesteps by the rule of a scheduler's `timestep_spacing`; only "leading" heeds the offset."""
    if spacing == "leading":
        return leading(count, num_train, steps_offset=steps_offset)
    rules: dict[str, Callable[[int, int], tuple[int, ...]]] = {"linspace": linspace, "trailing": trailing}
    if spacing not in rules:
        raise ValueError(f"spacing must be one of leading, linspace, trailing, got {spacing!r}.")
    return rules[spacing](count, num_train)


def respaced(sections: str, num_train: int = 1000) -> tuple[int, ...]:
    """The timesteps that a respacing string of the original IF stands for.

    "10,10,3,2,2" cuts time into five equal sections, cleanest first, and visits so many timesteps of each; "75" is
    one section; "ddim50" is the whole stride that yields exactly 50; a table's name stands for its string.
    """
    text = RESPACINGS.get(sections.strip(), sections.strip())
    if text.startswith("ddim"):
        return _whole_stride(_count_in(text.removeprefix("ddim"), sections), num_train)
    counts = [_count_in(part, sections) for part in text.split(",")]
    size, longer = divmod(num_train, len(counts))
    chosen: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if count > length:
            raise ValueError(f"{sections!r} asks for {count} timesteps of section {i}, which has only {length}.")
        chosen |= _section(start, length, count)
        start += length
    return checked(sorted(chosen, reverse=True), num_train)


def _section(start: int, length: int, count: int) -> set[int]:
    """Both ends of the section and evenly between. The position is summed up, not multiplied: 949, not 950."""
    stride = (length - 1) / (count - 1) if count > 1 else 1.0
    chosen, position = set(), 0.0
    for _ in range(count):
        chosen.add(start + round(position))
        position += stride
    return chosen


def _whole_stride(count: int, num_train: int) -> tuple[int, ...]:
    for stride in range(1, num_train):
        if len(range(0, num_train, stride)) == count:
            return tuple(reversed(range(0, num_train, stride)))
    raise ValueError(f"No whole stride through {num_train} timesteps visits exactly {count} of them.")


def _count_in(text: str, sections: str) -> int:
    if not text.strip().isdecimal():
        names = ", ".join(RESPACINGS)
        raise ValueError(
            f"timesteps as a text are a count, counts joined by commas, 'ddim' with a count, or one of {names}; "
            f"got {sections!r}."
        )
    return int(text)


def checked(timesteps: Iterable[Any], num_train: int = 1000) -> tuple[int, ...]:
    """A table that a caller wrote: whole numbers, strictly descending, within [0, num_train), at least one."""
    if isinstance(timesteps, str):
        raise TypeError(f"timesteps must be whole numbers, got the text {timesteps!r}; respaced() reads such strings.")
    try:
        table = tuple(_whole(t) for t in timesteps)
    except TypeError as error:
        raise TypeError(f"timesteps must be a row of whole numbers, got {timesteps!r}.") from error
    if not table:
        raise ValueError("timesteps must hold at least one timestep, got none.")
    for t, t_next in pairwise(table):
        if t_next >= t:
            raise ValueError(f"timesteps must be in strictly descending order, got {t_next} after {t}.")
    if table[0] >= num_train or table[-1] < 0:
        raise ValueError(f"timesteps must lie in [0, {num_train}), got {table[0]} to {table[-1]}.")
    return table


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a truth value is not a timestep")
    return operator.index(value)


def _is_share(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) <= 1


def _checked_count(count: int, num_train: int) -> int:
    if not 1 <= _whole(count) <= num_train:
        raise ValueError(f"num_inference_steps must be in [1, {num_train}], got {count}.")
    return count


def steps_of(timesteps: Iterable[int], strength: float = 1.0) -> tuple[Step, ...]:
    """The moves actually made: `strength` < 1 skips the noisiest ones, so that more of a given picture survives."""
    table = tuple(timesteps)
    if not table:
        raise ValueError("timesteps must hold at least one timestep, got none.")
    if not _is_share(strength):
        raise ValueError(f"strength must be in (0, 1], got {strength!r}.")
    count = int(len(table) * strength)
    if count < 1:
        raise ValueError(
            f"strength {strength} leaves none of {len(table)} steps; it must be at least {1 / len(table):.4g}, "
            f"or num_inference_steps at least {int(-(-1 // strength))}."
        )
    moves = [Step(i, t, t_prev) for i, (t, t_prev) in enumerate(zip(table, (*table[1:], -1), strict=True))]
    return tuple(moves[len(moves) - count :])


RESPACINGS: Mapping[str, str] = MappingProxyType(
    {
        "fast27": "10,10,3,2,2",
        "smart27": "7,4,2,1,2,4,7",
        "smart50": "10,6,4,3,2,2,3,4,6,10",
        "smart100": "1,1,1,1,2,2,2,2,2,2,3,3,4,4,5,5,6,7,7,8,9,10,13",
        "smart185": "1,1,2,2,2,3,3,3,4,5,6,7,8,9,10,11,12,13,14,15,16,18,20",
        "super27": "1,1,1,1,1,1,1,2,5,13",
        "super40": "2,2,2,2,2,2,3,4,6,15",
        "super100": "4,4,6,6,8,8,10,10,14,30",
    }
)
TABLES: Mapping[str, tuple[int, ...]] = MappingProxyType({name: respaced(name) for name in RESPACINGS})

fast27_timesteps = TABLES["fast27"]
smart27_timesteps = TABLES["smart27"]
smart50_timesteps = TABLES["smart50"]
smart100_timesteps = TABLES["smart100"]
smart185_timesteps = TABLES["smart185"]
super27_timesteps = TABLES["super27"]
super40_timesteps = TABLES["super40"]
super100_timesteps = TABLES["super100"]
