"""What a plan says: of each network where it lies, in what precision and in how many pieces; and what to expect."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from floyd.runtime.machine import Machine
from floyd.runtime.parts import Precision, Way

Place = Literal["card", "visits", "streamed", "cpu"]

PROCESS_BYTES = 460_000_000  # Python, torch and transformers: measured, without a card
CARD_PROCESS_BYTES = 1_500_000_000  # the same with a card's driver: not measured


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
    copies: bool = True  # whether weights may be laid out anew for many steps, which is faster and takes memory
    copied_bytes: int = 0  # what that takes, where it is done

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

    def busy_bytes(self, part: str) -> int:
        """Main memory that a network takes for its work, beside those that are kept."""
        choice = self[part]
        own = choice.peak_bytes - self.base_bytes if choice.place == "cpu" else choice.num_bytes
        return own - choice.num_bytes if choice.is_kept else own

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
