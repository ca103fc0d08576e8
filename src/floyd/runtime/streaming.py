"""A network larger than the device: as many of its layers stay there as a budget allows, the rest passes through a ring
of slots while the layers before it compute.

A copy waits for the slot to be free, the computing for the copy, and the program for neither. Main memory keeps all
weights all the time, so nothing is ever copied back: a layer that leaves is pointed at main memory again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from floyd.runtime.parts import SLOTS, Ring, least_bytes, smallest_ring
from floyd.runtime.placement import Visits, bring_inputs
from floyd.runtime.transfers import Transfers, transfers_to

_ALIGNMENT = 256


@dataclass(frozen=True)
class Streamed(Visits):
    """At most `budget_bytes` of a network are on the device while it works."""

    device: torch.device
    budget_bytes: int
    slots: int = SLOTS
    transfers: Transfers | None = field(default=None, compare=False)  # instead of the device's own

    def __post_init__(self) -> None:
        if self.slots < 2:
            raise ValueError(f"A ring has at least 2 slots, one to compute with and one to fill; got {self.slots}.")
        if self.budget_bytes <= 0:
            raise ValueError(f"budget_bytes must be more than 0, got {self.budget_bytes}.")

    @contextmanager
    def visit(self, module: nn.Module) -> Iterator[None]:
        units, memory = _units_of(module), _MEMORIES.setdefault(module, _Memory())
        journey = _Journey(units, self, memory)
        handles = [module.register_forward_pre_hook(bring_inputs(self.device), with_kwargs=True, prepend=True)]
        try:
            journey.begin()
            for unit in units:
                if unit.is_layer:
                    handles.append(unit.layer.register_forward_pre_hook(journey.arriving(unit)))
                    handles.append(unit.layer.register_forward_hook(journey.leaving(unit), always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            journey.end()


@dataclass(eq=False)
class _Memory:
    """What is worth keeping of a network between its journeys, by the names of its layers."""

    route: list[str] = field(default_factory=list)  # in the order of one pass
    arenas: dict[str, Tensor] = field(default_factory=dict)


_MEMORIES: WeakKeyDictionary[nn.Module, _Memory] = WeakKeyDictionary()


class _Tensor:
    """A weight or a buffer, and its place among the bytes of its layer."""

    def __init__(self, tensor: Tensor, offset: int) -> None:
        self.tensor, self.offset = tensor, offset
        dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
        self.shape = tensor.shape
        self.stride = tensor.stride() if dense else tensor.contiguous().stride()

    def point(self, at: Tensor) -> None:
        self.tensor.data = self.view(at)

    def lies_in(self, host: Tensor) -> bool:
        return self.tensor.numel() == 0 or self.tensor.data_ptr() == host.data_ptr() + self.offset

    def view(self, at: Tensor) -> Tensor:
        end = self.offset + self.tensor.numel() * self.tensor.element_size()
        return at[self.offset : end].view(self.tensor.dtype).as_strided(self.shape, self.stride)


@dataclass(eq=False)
class _Unit:
    """A layer: what comes and goes as one. A module with layers below it may own weights, too: they come first and stay
    to the end."""

    name: str
    layer: nn.Module
    tensors: list[_Tensor]
    num_bytes: int
    is_layer: bool
    host: Tensor | None = None
    at: Tensor | None = None  # on the device
    slot: _Slot | None = None
    ticket: Any = None  # of the copy that brings it
    num_users: int = 0

    def pack(self, transfers: Transfers, arenas: dict[str, Tensor]) -> None:
        """Its bytes side by side in main memory, where copies leave from; once, unless its weights were changed."""
        host = arenas.get(self.name)
        if host is not None and host.nbytes == self.num_bytes and all(one.lies_in(host) for one in self.tensors):
            self.host = host
            return
        host = arenas[self.name] = transfers.arena(self.num_bytes)
        for one in self.tensors:
            one.view(host).copy_(one.tensor.data)
            one.point(host)
        self.host = host

    def point(self, at: Tensor) -> None:
        for one in self.tensors:
            one.point(at)


@dataclass(eq=False)
class _Slot:
    buffer: Tensor
    unit: _Unit | None = None
    free: Any = None  # a ticket: what computed with it is done
    last_use: int = 0


def _units_of(module: nn.Module) -> list[_Unit]:
    units = []
    seen: set[int] = set()
    for name, layer in module.named_modules():
        own = [t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None]
        tensors, offset = [], 0
        for tensor in own:
            if id(tensor) not in seen:  # tied weights travel with the first of their layers
                seen.add(id(tensor))
                tensors.append(_Tensor(tensor, offset))
                offset += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        if tensors:
            units.append(_Unit(name, layer, tensors, offset, next(layer.children(), None) is None))
    return units


class _Journey:
    """One stay of a network on a device."""

    def __init__(self, units: list[_Unit], plan: Streamed, memory: _Memory) -> None:
        self.units, self.plan, self.memory = units, plan, memory
        self.transfers = plan.transfers or transfers_to(plan.device)
        self.layers = [unit for unit in units if unit.is_layer]
        self.log: deque[_Unit] = deque(maxlen=2 * len(self.layers) + 2)
        self.following: dict[_Unit, _Unit] = {}
        self.resident: set[_Unit] = set()
        self.ring: list[_Slot] = []
        self.clock = 0
        self.changed = Condition()

    # ------------------------------------------------------------------------------------------------- begin and end

    def begin(self) -> None:
        fixed = [unit for unit in self.units if not unit.is_layer]
        room = self.plan.budget_bytes - sum(unit.num_bytes for unit in fixed)
        ring = smallest_ring([unit.num_bytes for unit in self.layers], room, self.plan.slots) if room > 0 else None
        if ring is None:
            need = self.plan.budget_bytes - room + least_bytes([u.num_bytes for u in self.layers], self.plan.slots)
            raise ValueError(
                f"{self.plan.budget_bytes} bytes on {self.plan.device} are too few to stream this network through: its "
                f"largest layers need {need}."
            )
        called = {unit.name: unit for unit in self.layers}
        order = [called[name] for name in self.memory.route if name in called]
        self.following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        others = [unit for unit in self.layers if unit not in self.following]
        self.resident = _residents(order, others, ring)
        if not order:
            self.following = dict(zip(self.layers, self.layers[1:], strict=False))
        if ring.slot_bytes:
            self.ring = [_Slot(self.transfers.buffer(ring.slot_bytes)) for _ in range(self.plan.slots)]
        for unit in self.units:
            unit.pack(self.transfers, self.memory.arenas)
        for unit in fixed:
            self._bring(unit)
            self.transfers.wait(unit.ticket)
            assert unit.at is not None, "it was brought"
            unit.point(unit.at)

    def end(self) -> None:
        """Everything points at main memory again. What was fetched and not used may still be on its way: whoever gets
        the memory next waits for it."""
        with self.changed:
            for unit in self.units:
                if unit.host is not None:
                    unit.point(unit.host)
                self.transfers.wait(unit.ticket)
                unit.at = unit.slot = unit.ticket = None
            self.ring.clear()
            self.memory.route = self._cycle()

    def _cycle(self) -> list[str]:
        """The layers of one pass in their order: those of the last one."""
        calls = list(self.log)
        if not calls:
            return self.memory.route
        before = [i for i, unit in enumerate(calls[:-1]) if unit is calls[-1]]
        last = calls[before[-1] + 1 :] if before else calls
        return list(dict.fromkeys(unit.name for unit in last))

    # --------------------------------------------------------------------------------------------------------- layers

    def arriving(self, unit: _Unit) -> Any:
        def arrive(layer: nn.Module, args: tuple[Any, ...]) -> None:
            with self.changed:
                if self.log and self.log[-1] is not unit:
                    self.following[self.log[-1]] = unit
                self.log.append(unit)
                while not self._bring(unit):
                    self.changed.wait()
                unit.num_users += 1
                self._touch(unit)
                self.transfers.wait(unit.ticket)
                assert unit.at is not None, "it was brought"
                unit.point(unit.at)
                self._look_ahead(unit)

        return arrive

    def leaving(self, unit: _Unit) -> Any:
        def leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            with self.changed:
                unit.num_users = max(0, unit.num_users - 1)
                if unit.slot is not None:
                    unit.slot.free = self.transfers.mark()
                self.changed.notify_all()

        return leave

    def _look_ahead(self, unit: _Unit) -> None:
        """Begin to bring what comes after; as many through the ring as there are slots beside the one in use."""
        coming, through_ring = [unit], 0
        while through_ring < len(self.ring) - 1 or not self.ring:
            following = self.following.get(coming[-1])
            if following is None or following in coming or len(coming) > 2 * self.plan.slots + 8:
                return
            coming.append(following)
            if following not in self.resident:
                through_ring += 1
            if not self._bring(following, sparing=coming):
                return

    def _bring(self, unit: _Unit, sparing: Sequence[_Unit] = ()) -> bool:
        """Its copy has begun, or it is there; False if every slot is in use or spared."""
        if unit.at is not None:
            return True
        assert unit.host is not None, "packed at the beginning"
        after = None
        if unit in self.resident or not unit.is_layer:
            unit.at = self.transfers.buffer(unit.num_bytes)
        else:
            slot = self._free_slot(sparing)
            if slot is None:
                return False
            if slot.unit is not None:
                self._evict(slot.unit)
            after, slot.unit, unit.slot = slot.free, unit, slot
            unit.at = slot.buffer[: unit.num_bytes]
            self._touch(unit)
        unit.ticket = self.transfers.copy(unit.at, unit.host, after=after)
        return True

    def _free_slot(self, sparing: Sequence[_Unit]) -> _Slot | None:
        free = [slot for slot in self.ring if slot.unit is None or not (slot.unit.num_users or slot.unit in sparing)]
        return min(free, key=lambda slot: slot.last_use, default=None)

    def _evict(self, unit: _Unit) -> None:
        assert unit.host is not None, "packed at the beginning"
        unit.point(unit.host)
        unit.at = unit.slot = unit.ticket = None

    def _touch(self, unit: _Unit) -> None:
        self.clock += 1
        if unit.slot is not None:
            unit.slot.last_use = self.clock


def _residents(order: Sequence[_Unit], others: Sequence[_Unit], ring: Ring) -> set[_Unit]:
    """The layers that stay: those that no slot can hold; then, as far as there is room, of those that are called in
    every pass, evenly spread, so that between two that are carried there is always something to compute."""
    everyone = [*order, *others]
    if not ring.slot_bytes:
        return set(everyone)
    found = {unit for unit in everyone if unit.num_bytes > ring.slot_bytes}
    room = ring.resident_bytes - sum(unit.num_bytes for unit in found)
    for row in (order, others):
        rest = [unit for unit in row if unit not in found]
        total, saved = sum(unit.num_bytes for unit in rest), 0.0
        share = min(1.0, room / total) if total else 0.0
        for unit in rest:
            saved += share * unit.num_bytes
            if unit.num_bytes <= min(saved + 0.5, room):
                found.add(unit)
                saved -= unit.num_bytes
                room -= unit.num_bytes
    return found
