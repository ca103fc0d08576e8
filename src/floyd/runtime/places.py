"""The ways in which one network can compute on a machine, with what each takes of its memory and time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from floyd.runtime.choices import CARD_PROCESS_BYTES, PROCESS_BYTES, Choice
from floyd.runtime.machine import Machine
from floyd.runtime.parts import ITEM_BYTES, Part, Precision, Way, least_bytes, smallest_ring

# Beside weights and the tensors of the formulas.
CARD_WORKSPACE = 200_000_000  # bytes that libraries take for themselves: not measured
_UNHIDDEN = 0.1  # of what comes to the card, before there is anything to compute: assumed
CPU_HALF = 1.1  # 16 bits on a CPU: some are faster with them and many slower, so they are chosen for space alone
CPU_WORKING = 1.5  # on a CPU, convolutions repack their input and output, and the weight that they use: measured


class Option(NamedTuple):
    """One way for one network."""

    seconds: float
    kept_bytes: int  # in main memory all the time
    passing_bytes: int  # in main memory while it is loaded or works
    choice: Choice


@dataclass(frozen=True)
class Site:
    """A machine and what may be used of it: `vram` bytes of one card, 0 for none, and `ram` bytes beside them."""

    vram: int
    ram: int
    machine: Machine

    @property
    def has_card(self) -> bool:
        return self.vram > 0

    @property
    def base(self) -> int:
        return CARD_PROCESS_BYTES if self.has_card else PROCESS_BYTES

    def options(self, part: Part, stays: Precision | None, resident: int) -> Iterator[Option]:
        """`stays`: the precision in which it stays on the card, if it does; `resident`: bytes of all that do."""
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

    def _on_cpu(self, part: Part, precision: Precision, way: Way) -> Iterator[Option]:
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
            max_rows=self.rows(way, precision, self.ram - self.base - size - work),
            is_kept=True,
            way=way,
            peak_bytes=self.base + size + work,
            seconds=seconds,
            why="in main memory, where it computes",
        )
        option = Option(seconds, size, work, choice)
        yield option
        yield self._from_disk(part, option)

    def _staying(self, part: Part, precision: Precision, way: Way, resident: int) -> Option | None:
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
            max_rows=self.rows(way, precision, self.vram - peak),
            is_kept=True,
            way=way,
            peak_bytes=peak,
            seconds=seconds,
            why="stays on the card: there is room for it beside all others",
        )
        return Option(seconds, 0, size, choice)

    def _visiting(self, part: Part, precision: Precision, way: Way, resident: int) -> Option | None:
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
            max_rows=self.rows(way, precision, 0 if slot_bytes else room - size),
            is_kept=True,
            way=way,
            peak_bytes=resident + working + (room if slot_bytes else size),
            seconds=seconds,
            why=why,
        )
        return Option(seconds, size, 0, choice)

    def _from_disk(self, part: Part, option: Option) -> Option:
        """The same, but for weights that main memory does not keep."""
        size = option.choice.num_bytes
        seconds = option.seconds + max(part.stored_bytes, size) / self.machine.disk_bytes
        why = f"{option.choice.why}; read from disk each time, as main memory cannot keep it"
        choice = replace(option.choice, is_kept=False, seconds=seconds, why=why)
        return Option(seconds, 0, option.passing_bytes + size, choice)

    def rows(self, way: Way, precision: Precision, left: int) -> int:
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

    # ------------------------------------------------------------------------------------------------------- the least

    def least_vram(self, part: Part) -> int:
        """Below this the network cannot compute on the card at all."""
        return min(
            self._working_bytes(part, precision, way) + least_bytes(part.units(precision)) + 1
            for precision, way in product(part.precisions, part.ways)
        )

    def least_ram(self, part: Part) -> int:
        return min(option.kept_bytes + option.passing_bytes for option in self.options(part, None, 0))


def _ring(part: Part, precision: Precision, room: int) -> tuple[int, int] | None:
    size = part.num_bytes(precision)
    if size <= room:
        return 0, size
    found = smallest_ring(part.units(precision), room)
    return None if found is None else (found.slot_bytes, found.resident_bytes)


def _quickest(options: Iterable[Option | None]) -> Option | None:
    return min((option for option in options if option is not None), key=lambda option: option.seconds, default=None)
