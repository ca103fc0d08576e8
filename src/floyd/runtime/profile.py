"""Where the time went, as a table: by stage and part, with the share that the arithmetic alone would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from floyd.runtime.clock import Clock, Place, Row, begun, ended
from floyd.runtime.rates import Arithmetic, Rate, measured

# In the order of the table.
PARTS: Mapping[str, str] = {
    "text": "text",
    "prepare": "UNet, before the steps",
    "unet": "UNet, steps",
    "guidance": "guidance",
    "sampler": "sampler",
    "vae": "VAE",
    "safety": "safety checker",
    "transfers": "transfers",
    "callbacks": "progress, callbacks",
    "other": "other",
}
STEP = ("unet", "guidance", "sampler")  # what a step is made of


@dataclass(frozen=True, kw_only=True)
class PartTime:
    """A row of the table."""

    stage: str
    part: str
    seconds: float
    count: int  # of texts read, steps, decoded batches, ...; 0 where there is nothing to count
    median_s: float | None  # of one of them
    flops: float  # 0 where they are not counted
    floor_s: float | None  # what the flops alone would take; None if that is not known


@dataclass(frozen=True, kw_only=True)
class StageTime:
    seconds: float
    steps: int
    step_s: float | None  # UNet, guidance and sampler, of one step


class Profile:
    """`with pipe.profile() as profile:` times what is painted in the block, by stage and part; `print(profile)`.

    All calls of floyd's pipelines and cascades in the block and its thread are watched; calls in other threads are
    not. Several blocks, one after the other, add up. With `floor` the end of the block measures for a moment how fast
    this machine computes, which is what the share of the floor is made of.
    """

    def __init__(self, *, floor: bool = True) -> None:
        self.floor = floor
        self.outside_s = 0.0  # the caller's own time in the block
        self.cpu_s = 0.0  # of the processor, by all threads of this process, other calls' too
        self.rates: dict[Arithmetic, Rate] = {}
        self._rows: dict[Place, Row] = {}
        self._open: Clock | None = None

    def __enter__(self) -> Self:
        if self._open is not None:
            raise RuntimeError("This profile is open already: end its block first, or make another profile.")
        self._open = begun()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        clock, self._open = self._open, None
        assert clock is not None, "entered"
        ended(clock)
        self.outside_s += clock.outside_s
        self.cpu_s += clock.cpu_s
        for place, row in clock.rows.items():
            self._rows.setdefault(place, Row()).add(row)
        if self.floor and kind is None:
            wanted = {arithmetic for row in self._rows.values() for arithmetic in row.work}
            for arithmetic in wanted - set(self.rates):
                if (rate := measured(arithmetic)) is not None:
                    self.rates[arithmetic] = rate

    @property
    def seconds(self) -> float:
        """All the time there was."""
        return self.outside_s + sum(row.seconds for row in self._rows.values())

    @property
    def parts(self) -> list[PartTime]:
        """By stage, in the order of their first use, and then by part."""
        order = list(PARTS)
        stages = list(dict.fromkeys(place.stage for place in self._rows))
        places = sorted(self._rows, key=lambda place: (stages.index(place.stage), order.index(place.part)))
        return [self._part(place) for place in places]

    @property
    def stages(self) -> dict[str, StageTime]:
        found = {}
        for name in dict.fromkeys(row.stage for row in self.parts):
            own = [row for row in self.parts if row.stage == name]
            steps = sum(row.count for row in own if row.part == "sampler")
            step_s = sum(row.seconds for row in own if row.part in STEP) / steps if steps else None
            found[name] = StageTime(seconds=sum(row.seconds for row in own), steps=steps, step_s=step_s)
        return found

    def to_json(self) -> dict[str, Any]:
        parts = [{**vars(row), "share": self._share(row.seconds)} for row in self.parts]
        return {
            "seconds": self.seconds,
            "outside_s": self.outside_s,
            "cpu_s": self.cpu_s,
            "stages": {name: vars(stage) for name, stage in self.stages.items()},
            "parts": parts,
            "rates": [rate.to_json() for rate in self.rates.values()],
        }

    def table(self) -> str:
        rows: list[tuple[str, ...]] = [("", "count", "seconds", "share", "ms each", "floor")]
        for name, stage in self.stages.items():
            steps = f"{stage.steps} steps" if stage.steps else ""
            each = "" if stage.step_s is None else f"{1000 * stage.step_s:.1f}"
            rows.append((name, steps, f"{stage.seconds:.3f}", _percent(self._share(stage.seconds)), each, ""))
            rows += [self._told(row) for row in self.parts if row.stage == name]
        rows.append(("outside", "", f"{self.outside_s:.3f}", _percent(self._share(self.outside_s)), "", ""))
        rows.append(("all", "", f"{self.seconds:.3f}", _percent(self._share(self.seconds)), "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), *self._footnote()])

    def __str__(self) -> str:
        return self.table()

    def _part(self, place: Place) -> PartTime:
        row = self._rows[place]
        is_known = bool(row.work) and all(arithmetic in self.rates for arithmetic in row.work)
        floor_s = (
            sum(flops / self.rates[arithmetic].flops for arithmetic, flops in row.work.items()) if is_known else None
        )
        return PartTime(
            stage=place.stage,
            part=place.part,
            seconds=row.seconds,
            count=row.count,
            median_s=median(row.laps) if row.laps else None,
            flops=sum(row.work.values()),
            floor_s=floor_s,
        )

    def _told(self, row: PartTime) -> tuple[str, ...]:
        each = "" if row.median_s is None else f"{1000 * row.median_s:.1f}"
        floor = "" if row.floor_s is None or row.seconds == 0 else _percent(row.floor_s / row.seconds)
        count = str(row.count) if row.count else ""
        return (f"  {PARTS[row.part]}", count, f"{row.seconds:.3f}", _percent(self._share(row.seconds)), each, floor)

    def _footnote(self) -> list[str]:
        worked = f"the processor worked {self.cpu_s:.3f} s of it for this process"
        if not self.rates:
            return [worked]
        return [
            worked,
            "floor: how much of the time the arithmetic alone would take, at what was measured right after",
            *(f"  {rate}" for rate in self.rates.values()),
        ]

    def _share(self, seconds: float) -> float:
        whole = self.seconds
        return seconds / whole if whole else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
