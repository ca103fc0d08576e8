"""Which network lies where, in what precision and in how many pieces, so that a call takes the least time.

`places` knows the ways of one network, `search` the best of them for all on one card; here is what is given up when
nothing fits, and the spreading over several cards. Seconds are estimates: arithmetic and memory at the machine's rates,
plus what is carried. Bytes are meant to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from floyd.runtime.budget import Budget
from floyd.runtime.choices import CARD_PROCESS_BYTES, Choice, Place, Plan
from floyd.runtime.machine import Machine
from floyd.runtime.parts import Part
from floyd.runtime.places import Site
from floyd.runtime.search import Search

__all__ = ["Choice", "Place", "Plan", "plan"]


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
    return Search(parts, Site(cards[0] if cards else 0, budget.ram_bytes, machine), count).best()


def _spread(parts: Sequence[Part], cards: Sequence[int], ram: int, machine: Machine, count: int) -> Plan:
    """The same over several cards: the networks of a stage lie together, and a text encoder may lie apart from them."""
    groups = list(dict.fromkeys(part.group for part in parts))
    plans: dict[tuple[int, frozenset[str]], Plan | None] = {}

    def own_plan(size: int, names: frozenset[str]) -> Plan | None:
        if (size, names) not in plans:
            own = [part for part in parts if part.group in names]
            try:
                plans[size, names] = Search(own, Site(size, ram, machine), count).best()
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
        return Search(parts, Site(max(cards), ram, machine), count).best()
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
