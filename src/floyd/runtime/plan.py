"""Which network lies where, in what precision and in how many pieces, so that a call takes the least time.

The networks of a cascade compute one after the other. What stays on the card takes its room from all of them; what
comes only for its own work is limited by what is left. So the search goes over what stays, all of it, and for each such
choice finds every other network's best way by itself: few enough to try them all, and what a larger budget allows
holds all that a smaller one does, so that more memory is never slower.

Seconds are estimates: arithmetic and memory at the machine's rates, plus what is carried. Bytes are meant to be kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal, NamedTuple

from floyd.runtime.budget import Budget
from floyd.runtime.machine import Machine
from floyd.runtime.parts import ITEM_BYTES, Part, Precision, Way, least_bytes, smallest_ring

Place = Literal["card", "visits", "streamed", "cpu"]

# Beside weights and the tensors of the formulas, in bytes.
CARD_WORKSPACE = 200_000_000  # what libraries take for themselves: not measured
PROCESS_BYTES = 460_000_000  # Python, torch and transformers: measured, without a card
CARD_PROCESS_BYTES = 1_500_000_000  # the same with a card's driver: not measured
_UNHIDDEN = 0.1  # of what comes to the card, before there is anything to compute: assumed
CPU_HALF = 1.1  # 16 bits on a CPU: some are faster with them and many slower, so they are chosen for space alone
CPU_WORKING = 1.5  # on a CPU, convolutions repack their input and output, and the weight that they use: measured


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be done with one network."""

    part: str
    place: Place
    precision: Precision
    num_bytes: int  # of its weights
    resident_bytes: int  # of these on the card while it works; for "cpu" in main memory
    room_bytes: int  # what they may take there
    max_rows: int  # of a batch at once: as many as the budget allows
    is_kept: bool  # between calls; else its weights are read from disk each time
    way: Way
    peak_bytes: int  # on the card while it works, what stays of others included; for "cpu" in main memory
    seconds: float
    why: str
    card: int = 0

    @property
    def streamed_bytes(self) -> int:
        return self.num_bytes - self.resident_bytes if self.place == "streamed" else 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A choice for every network, and what to expect of them."""

    choices: tuple[Choice, ...]
    machine: Machine
    vram_peaks: tuple[int, ...]  # by card
    ram_peak: int
    count: int  # pictures in the call

    @property
    def vram_peak(self) -> int:
        return max(self.vram_peaks, default=0)

    @property
    def base_bytes(self) -> int:
        """Main memory without any network."""
        return CARD_PROCESS_BYTES if self.vram_peaks else PROCESS_BYTES

    @property
    def seconds(self) -> float:
        return sum(choice.seconds for choice in self.choices)

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.count

    def __getitem__(self, part: str) -> Choice:
        return next(choice for choice in self.choices if choice.part == part)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(choice.part for choice in self.choices)

    def __contains__(self, part: object) -> bool:
        return part in self._names

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "component": c.part,
                "where": c.place,
                "card": c.card,
                "dtype": c.precision.dtype,
                "quantization": c.precision.quantization,
                "bytes": c.num_bytes,
                "resident_bytes": c.resident_bytes,
                "kept": c.is_kept,
                "rows_at_once": c.way.rows,
                "tile": c.way.tile,
                "peak_bytes": c.peak_bytes,
                "seconds": c.seconds,
                "why": c.why,
            }
            for c in self.choices
        ]
        return {
            "machine": self.machine.name,
            "count": self.count,
            "vram_peak_bytes": list(self.vram_peaks),
            "ram_peak_bytes": self.ram_peak,
            "seconds_per_image": self.seconds_per_image,
            "components": rows,
        }


def plan(parts: Sequence[Part], budget: Budget, machine: Machine, *, count: int = 1) -> Plan:
    """The fastest that the budget allows. ValueError, with the smallest budget that works, where there is none."""
    ladder = _LADDER if budget.quantize else _EXACT
    rungs = [[part.limited(kinds, tiles=tiles) for part in parts] for kinds, tiles in ladder]
    for rung in rungs[:-1]:
        try:
            return _planned(rung, budget, machine, count)
        except ValueError:
            continue  # the next rung gives up more
    return _planned(rungs[-1], budget, machine, count)


# What is given up only where nothing else works: the seams of tiles, then weights of 4 bits.
_LADDER: tuple[tuple[frozenset[str | None], bool], ...] = (
    (frozenset({None, "int8"}), False),
    (frozenset({None, "int8"}), True),
    (frozenset({None, "int8", "int4"}), True),
)
_EXACT: tuple[tuple[frozenset[str | None], bool], ...] = ((frozenset({None}), False), (frozenset({None}), True))


def _planned(parts: Sequence[Part], budget: Budget, machine: Machine, count: int) -> Plan:
    cards = budget.cards if machine.has_card else ()
    if len(cards) > 1:
        return _spread(parts, cards, budget.ram_bytes, machine, count)
    return _Search(parts, cards[0] if cards else 0, budget.ram_bytes, machine, count).best()


def _spread(parts: Sequence[Part], cards: Sequence[int], ram: int, machine: Machine, count: int) -> Plan:
    """The same over several cards: the networks of a stage lie together, and a text encoder may lie apart from them."""
    groups = list(dict.fromkeys(part.group for part in parts))
    plans: dict[tuple[int, frozenset[str]], Plan | None] = {}

    def own_plan(size: int, names: frozenset[str]) -> Plan | None:
        if (size, names) not in plans:
            own = [part for part in parts if part.group in names]
            try:
                plans[size, names] = _Search(own, size, ram, machine, count).best()
            except ValueError:
                plans[size, names] = None
        return plans[size, names]

    found: Plan | None = None
    for places in product(range(len(cards)), repeat=len(groups)):
        sets = [frozenset(g for g, p in zip(groups, places, strict=True) if p == card) for card in range(len(cards))]
        own = [own_plan(size, names) if names else None for size, names in zip(cards, sets, strict=True)]
        if any(names and one is None for names, one in zip(sets, own, strict=True)):
            continue
        joined = _joined([(card, one) for card, one in enumerate(own) if one is not None], parts, cards)
        if joined.ram_peak <= ram and (found is None or joined.seconds < found.seconds):
            found = joined
    if found is None:  # which a single card would say, too, and with the reason
        return _Search(parts, max(cards), ram, machine, count).best()
    return found


def _joined(plans: Sequence[tuple[int, Plan]], parts: Sequence[Part], cards: Sequence[int]) -> Plan:
    """One plan of those of the cards. Each counts the process and what passes; kept are the networks of all."""
    by_name = {choice.part: replace(choice, card=card) for card, own in plans for choice in own.choices}
    peaks = dict.fromkeys(range(len(cards)), 0) | {card: own.vram_peak for card, own in plans}
    first = plans[0][1]
    return Plan(
        choices=tuple(by_name[part.name] for part in parts),
        machine=first.machine,
        vram_peaks=tuple(peaks.values()),
        ram_peak=sum(own.ram_peak for _, own in plans) - CARD_PROCESS_BYTES * (len(plans) - 1),
        count=first.count,
    )


class _Option(NamedTuple):
    """One way for one network."""

    seconds: float
    kept_bytes: int  # in main memory all the time
    passing_bytes: int  # in main memory while it is loaded or works
    choice: Choice


@dataclass(frozen=True, eq=False)
class _Search:
    parts: Sequence[Part]
    vram: int
    ram: int
    machine: Machine
    count: int

    @property
    def has_card(self) -> bool:
        return self.vram > 0

    @property
    def base(self) -> int:
        return CARD_PROCESS_BYTES if self.has_card else PROCESS_BYTES

    def best(self) -> Plan:
        found: tuple[float, list[_Option], int] | None = None
        for staying in self._stayings():
            resident = sum(part.num_bytes(p) for part, p in zip(self.parts, staying, strict=True) if p is not None)
            if self.has_card and resident > self.vram:
                continue
            options = [list(self._options(part, p, resident)) for part, p in zip(self.parts, staying, strict=True)]
            if not all(options):
                continue
            least = sum(min(option.seconds for option in own) for own in options)
            if found is not None and least >= found[0]:
                continue
            limit = float("inf") if found is None else found[0]
            if (chosen := _lightest(options, self.ram - self.base, limit)) is not None:
                found = (sum(option.seconds for option in chosen), chosen, resident)
        if found is None:
            raise ValueError(self._refusal())
        return self._plan(found[1])

    def _stayings(self) -> Iterable[tuple[Precision | None, ...]]:
        """For each network the precision in which it stays on the card, or None."""
        if not self.has_card:
            return [(None,) * len(self.parts)]
        return product(*[(*part.precisions, None) for part in self.parts])

    def _plan(self, chosen: Sequence[_Option]) -> Plan:
        kept = sum(option.kept_bytes for option in chosen)
        ram_peak = self.base + kept + max(option.passing_bytes for option in chosen)
        peaks = (max(option.choice.peak_bytes for option in chosen),) if self.has_card else ()
        return Plan(
            choices=tuple(option.choice for option in chosen),
            machine=self.machine,
            vram_peaks=peaks,
            ram_peak=ram_peak,
            count=self.count,
        )

    # ---------------------------------------------------------------------------------------------- one network's ways

    def _options(self, part: Part, stays: Precision | None, resident: int) -> Iterator[_Option]:
        if not self.has_card:
            for precision, way in product(part.precisions, part.ways):
                yield from self._on_cpu(part, precision, way)
        elif stays is not None:
            if (best := _quickest(self._staying(part, stays, way, resident) for way in part.ways)) is not None:
                yield best
        else:
            for precision in part.precisions:
                visits = (self._visiting(part, precision, way, resident) for way in part.ways)
                if (best := _quickest(visits)) is not None:
                    yield best
                    yield self._from_disk(part, best)

    def _on_cpu(self, part: Part, precision: Precision, way: Way) -> Iterator[_Option]:
        size = part.num_bytes(precision)
        work = self._working_bytes(part, precision, way)
        seconds = self._computing(part, precision, way)
        choice = Choice(
            part=part.name,
            place="cpu",
            precision=precision,
            num_bytes=size,
            resident_bytes=size,
            room_bytes=size,
            max_rows=self._rows(way, precision, self.ram - self.base - size - work),
            is_kept=True,
            way=way,
            peak_bytes=self.base + size + work,
            seconds=seconds,
            why="in main memory, where it computes",
        )
        option = _Option(seconds, size, work, choice)
        yield option
        yield self._from_disk(part, option)

    def _staying(self, part: Part, precision: Precision, way: Way, resident: int) -> _Option | None:
        peak = resident + self._working_bytes(part, precision, way)
        if peak > self.vram:
            return None
        seconds = self._computing(part, precision, way)
        size = part.num_bytes(precision)
        choice = Choice(
            part=part.name,
            place="card",
            precision=precision,
            num_bytes=size,
            resident_bytes=size,
            room_bytes=size,
            max_rows=self._rows(way, precision, self.vram - peak),
            is_kept=True,
            way=way,
            peak_bytes=peak,
            seconds=seconds,
            why="stays on the card: there is room for it beside all others",
        )
        return _Option(seconds, 0, size, choice)

    def _visiting(self, part: Part, precision: Precision, way: Way, resident: int) -> _Option | None:
        working = self._working_bytes(part, precision, way)
        size, room = part.num_bytes(precision), self.vram - resident - working
        if room <= 0 or (ring := _ring(part, precision, room)) is None:
            return None
        slot_bytes, may_stay = ring
        own = min(size, may_stay)
        computing, carried = self._computing(part, precision, way), size - own
        passes = part.passes * way.chunks
        link = self.machine.link_bytes
        one = computing / passes  # the first pass brings everything, layer by layer, while it computes
        seconds = max(one, size / link) + _UNHIDDEN * size / link + (passes - 1) * max(one, carried / link)
        why = "comes to the card for its work: to stay would leave the others too little room"
        if slot_bytes:
            why = f"{own / size:.0%} of it comes to the card and the rest passes through: the card cannot hold it whole"
        choice = Choice(
            part=part.name,
            place="streamed" if slot_bytes else "visits",
            precision=precision,
            num_bytes=size,
            resident_bytes=own,
            room_bytes=room,
            max_rows=self._rows(way, precision, 0 if slot_bytes else room - size),
            is_kept=True,
            way=way,
            peak_bytes=resident + working + (room if slot_bytes else size),
            seconds=seconds,
            why=why,
        )
        return _Option(seconds, size, 0, choice)

    def _from_disk(self, part: Part, option: _Option) -> _Option:
        """The same, but for weights that main memory does not keep."""
        size = option.choice.num_bytes
        seconds = option.seconds + max(part.stored_bytes, size) / self.machine.disk_bytes
        why = f"{option.choice.why}; read from disk each time, as main memory cannot keep it"
        choice = replace(option.choice, is_kept=False, seconds=seconds, why=why)
        return _Option(seconds, 0, option.passing_bytes + size, choice)

    def _rows(self, way: Way, precision: Precision, left: int) -> int:
        """As many as fit: those of the call, and more for a later one with more pictures."""
        rows = way.rows or 1
        more = max(0, left) / max(1.0, way.numbers / rows * ITEM_BYTES[precision.dtype])
        return rows + int(min(more, 10_000))

    def _working_bytes(self, part: Part, precision: Precision, way: Way) -> int:
        own = way.numbers * ITEM_BYTES[precision.dtype] * (1 if self.has_card else CPU_WORKING)
        workspace = CARD_WORKSPACE if self.has_card else max(part.units(precision))
        return int(own) + part.unpacked_bytes(precision) + part.held_bytes + workspace

    def _computing(self, part: Part, precision: Precision, way: Way) -> float:
        """All steps: arithmetic, or the reading of the weights where that takes longer; and unpacking them."""
        size, bandwidth = part.num_bytes(precision), self.machine.memory_bytes
        one = max(way.flops / self.machine.flops, way.chunks * size / bandwidth)
        if not self.has_card and precision.dtype != "float32":
            one *= CPU_HALF
        if precision.quantization is not None:
            one += way.chunks * part.num_weights * 4 / bandwidth
        return part.passes * one

    # --------------------------------------------------------------------------------------------------------- refusal

    def _refusal(self) -> str:
        if self.has_card and (need := max(self.least_vram(part) for part in self.parts)) > self.vram:
            return f"{_gb(self.vram)} of VRAM is too little for this: the smallest that works is {_gb(need, up=True)}."
        need = self._least_ram()
        return f"{_gb(self.ram)} of RAM is too little for this: the smallest that works is {_gb(need, up=True)}."

    def least_vram(self, part: Part) -> int:
        return min(
            self._working_bytes(part, precision, way) + least_bytes(part.units(precision)) + 1
            for precision, way in product(part.precisions, part.ways)
        )

    def _least_ram(self) -> int:
        needs = [
            min(option.kept_bytes + option.passing_bytes for option in self._options(part, None, 0))
            for part in self.parts
        ]
        return self.base + max(needs)


def _ring(part: Part, precision: Precision, room: int) -> tuple[int, int] | None:
    size = part.num_bytes(precision)
    if size <= room:
        return 0, size
    found = smallest_ring(part.units(precision), room)
    return None if found is None else (found.slot_bytes, found.resident_bytes)


def _quickest(options: Iterable[_Option | None]) -> _Option | None:
    return min((option for option in options if option is not None), key=lambda option: option.seconds, default=None)


def _lightest(options: Sequence[Sequence[_Option]], room: int, limit: float) -> list[_Option] | None:
    """One of each network's options, so that main memory holds what is kept and what passes, in the least time below
    the limit."""
    best: list[_Option] | None = None
    for passing in sorted({option.passing_bytes for own in options for option in own}):
        allowed = [sorted((o for o in own if o.passing_bytes <= passing), key=lambda o: o.seconds) for own in options]
        if not all(allowed):
            continue
        found = _packed(allowed, room - passing, limit)
        if found is not None:
            best, limit = found, sum(option.seconds for option in found)
    return best


def _packed(options: Sequence[Sequence[_Option]], room: int, limit: float) -> list[_Option] | None:
    """Depth first, the quickest first; `limit` is the time to beat."""
    if room < 0:
        return None
    least_seconds, least_kept = [0.0], [0]
    for own in reversed(options):
        least_seconds.append(least_seconds[-1] + min(option.seconds for option in own))
        least_kept.append(least_kept[-1] + min(option.kept_bytes for option in own))
    least_seconds.reverse()
    least_kept.reverse()
    best: list[_Option] | None = None

    def go(index: int, taken: list[_Option], seconds: float, kept: int) -> None:
        nonlocal best, limit
        if seconds + least_seconds[index] >= limit or kept + least_kept[index] > room:
            return
        if index == len(options):
            best, limit = list(taken), seconds
            return
        for option in options[index]:
            taken.append(option)
            go(index + 1, taken, seconds + option.seconds, kept + option.kept_bytes)
            taken.pop()

    go(0, [], 0.0, 0)
    return best


def _gb(num_bytes: int, *, up: bool = False) -> str:
    """Rounded to tenths; upwards where less would not do."""
    tenths = -(-num_bytes // 100_000_000) if up else num_bytes // 100_000_000
    return f"{tenths / 10:.1f} GB"
