"""The fastest plan for the networks of a chain on one card, or on none.

The networks compute one after the other. What stays on the card takes its room from all of them; what comes only for
its own work is limited by what is left. So the search goes over what stays, all of it, and for each such choice finds
every other network's best way by itself: few enough to try them all, and what a larger budget allows holds all that a
smaller one does, so that more memory is never slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from floyd.runtime.choices import Plan
from floyd.runtime.parts import Part, Precision
from floyd.runtime.places import Option, Site


@dataclass(frozen=True, eq=False)
class Search:
    parts: Sequence[Part]
    site: Site
    count: int  # pictures in the call

    def best(self) -> Plan:
        found: tuple[float, list[Option], int] | None = None
        for staying in self._stayings():
            resident = sum(part.num_bytes(p) for part, p in zip(self.parts, staying, strict=True) if p is not None)
            if self.site.has_card and resident > self.site.vram:
                continue
            options = [list(self.site.options(part, p, resident)) for part, p in zip(self.parts, staying, strict=True)]
            if not all(options):
                continue
            least = sum(min(option.seconds for option in own) for own in options)
            if found is not None and least >= found[0]:
                continue
            limit = float("inf") if found is None else found[0]
            if (chosen := _lightest(options, self.site.ram - self.site.base, limit)) is not None:
                found = (sum(option.seconds for option in chosen), chosen, resident)
        if found is None:
            raise ValueError(self._refusal())
        return self._plan(found[1])

    def _stayings(self) -> Iterable[tuple[Precision | None, ...]]:
        """For each network the precision in which it stays on the card, or None."""
        if not self.site.has_card:
            return [(None,) * len(self.parts)]
        return product(*[(*part.precisions, None) for part in self.parts])

    def _plan(self, chosen: Sequence[Option]) -> Plan:
        kept = sum(option.kept_bytes for option in chosen)
        chosen = [self._filled(part, one, kept) for part, one in zip(self.parts, chosen, strict=True)]
        ram_peak = self.site.base + kept + max(option.passing_bytes for option in chosen)
        peaks = (max(option.choice.peak_bytes for option in chosen),) if self.site.has_card else ()
        return Plan(
            choices=tuple(option.choice for option in chosen),
            machine=self.site.machine,
            vram_peaks=peaks,
            ram_peak=ram_peak,
            count=self.count,
        )

    def _filled(self, part: Part, option: Option, kept: int) -> Option:
        """What room is left beside a network is for its weights laid out anew, a gain of some percent, and for rows of
        a later call. One that is streamed has taken it already."""
        choice, is_carded = option.choice, self.site.has_card
        if choice.place == "streamed":
            return option
        if is_carded:
            room = self.site.vram - choice.peak_bytes
        else:
            room = self.site.ram - self.site.base - kept - option.passing_bytes
        wanted = part.copied_bytes(choice.precision)
        copied = wanted if wanted <= room else 0
        choice = replace(
            choice,
            copies=copied == wanted,
            copied_bytes=copied,
            peak_bytes=choice.peak_bytes + copied,
            max_rows=self.site.rows(choice.way, choice.precision, room - copied),
        )
        return option._replace(choice=choice, passing_bytes=option.passing_bytes + (0 if is_carded else copied))

    def _refusal(self) -> str:
        vram, ram = self.site.vram, self.site.ram
        if vram and (need := max(self.site.least_vram(part) for part in self.parts)) > vram:
            return f"{_gb(vram)} of VRAM is too little for this: the smallest that works is {_gb(need, up=True)}."
        need = self._least_ram()
        return f"{_gb(ram)} of RAM is too little for this: the smallest that works is {_gb(need, up=True)}."

    def _least_ram(self) -> int:
        return self.site.base + max(self.site.least_ram(part) for part in self.parts)


def _lightest(options: Sequence[Sequence[Option]], room: int, limit: float) -> list[Option] | None:
    """One of each network's options, so that main memory holds what is kept and what passes, in the least time below
    the limit."""
    best: list[Option] | None = None
    for passing in sorted({option.passing_bytes for own in options for option in own}):
        allowed = [sorted((o for o in own if o.passing_bytes <= passing), key=lambda o: o.seconds) for own in options]
        if not all(allowed):
            continue
        found = _packed(allowed, room - passing, limit)
        if found is not None:
            best, limit = found, sum(option.seconds for option in found)
    return best


def _packed(options: Sequence[Sequence[Option]], room: int, limit: float) -> list[Option] | None:
    """Depth first, the quickest first; `limit` is the time to beat."""
    if room < 0:
        return None
    least_seconds, least_kept = [0.0], [0]
    for own in reversed(options):
        least_seconds.append(least_seconds[-1] + min(option.seconds for option in own))
        least_kept.append(least_kept[-1] + min(option.kept_bytes for option in own))
    least_seconds.reverse()
    least_kept.reverse()
    best: list[Option] | None = None

    def go(index: int, taken: list[Option], seconds: float, kept: int) -> None:
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
