"""A memory plan at work: it says how networks are loaded, where they lie, and what to do when memory runs out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import nn

from floyd.pipelines.sizing import Sizing, Workload, described
from floyd.runtime.budget import Budget
from floyd.runtime.machine import Machine, this_machine
from floyd.runtime.parts import Precision
from floyd.runtime.placement import Assigned, OneAtATime, Placement, Stays, WhereTheyAre, accelerator
from floyd.runtime.plan import Choice, Plan, plan
from floyd.runtime.sleeping import fetch_ahead, release
from floyd.runtime.streaming import Streamed
from floyd.store.presets import STAGES
from floyd.store.pretrained import as_dtype

if TYPE_CHECKING:
    from floyd.pipelines.painter import Painter

log = logging.getLogger(__name__)

R = TypeVar("R")
Memory = Budget | str | int
SMALLER = 0.75  # of the budget, for a second try


@dataclass(eq=False)
class Managed:
    """The plan of a cascade or a pipeline; all its stages share it."""

    sizing: Sizing
    budget: Budget
    plan: Plan
    prefix: str = ""  # of this stage among the parts: "stage_1."
    shared: Managed | None = field(default=None, repr=False)  # the cascade's, of which this is a stage's view

    @classmethod
    def of(cls, sizing: Sizing, memory: Memory) -> Self:
        budget = Budget.of(memory)
        if budget.vram and not sizing.machine.has_card:
            log.warning("There is no accelerator here, so a budget of VRAM has no effect: main memory is what counts.")
        budget = budget.measured() if sizing.machine.has_card else replace(budget, vram=0).measured()
        made = plan(sizing.parts(), budget, sizing.machine, count=sizing.workload.count)
        return cls(sizing, budget, made)

    def stage(self, name: str) -> Managed:
        return Managed(self.sizing, self.budget, self.plan, f"{name}.", self)

    @property
    def whole(self) -> Managed:
        return self.shared or self

    def choice(self, component: str) -> Choice | None:
        """A stage's safety checker is the first stage's."""
        current = self.whole.plan
        for name in (f"{self.prefix}{component}", f"{STAGES[0]}.{component}"):
            if name in current and (component == "safety_checker" or name.startswith(self.prefix)):
                return current[name]
        return None

    def dtype_of(self, component: str) -> torch.dtype | None:
        choice = self.choice(component)
        return None if choice is None else as_dtype(choice.precision.dtype)

    def quantization_of(self, component: str) -> str | None:
        choice = self.choice(component)
        return None if choice is None else choice.precision.quantization

    def naps(self, component: str) -> bool:
        """Whether its weights are read for each use."""
        choice = self.choice(component)
        return choice is not None and not choice.is_kept

    def copies(self, component: str) -> bool:
        """Whether there is room for its weights to be laid out anew for many steps."""
        choice = self.choice(component)
        return choice is None or choice.copies

    def home(self, component: str) -> torch.device:
        """Where a network lies between its uses."""
        choice = self.choice(component)
        return _device(choice.card) if choice is not None and choice.place == "card" else torch.device("cpu")

    def placement(self, networks: Mapping[str, nn.Module]) -> Placement:
        general: Placement = WhereTheyAre()
        if self.whole.plan.vram_peaks:
            choice = self.choice("unet")
            general = OneAtATime(_device(0 if choice is None else choice.card))
        own = {network: placed for name, network in networks.items() if (placed := self._placed(name)) is not None}
        return Assigned(general, own)

    def _placed(self, component: str) -> Placement | None:
        choice = self.choice(component)
        if choice is None:
            return None
        if choice.place == "cpu":
            return WhereTheyAre()
        device = _device(choice.card)
        return Stays(device) if choice.place == "card" else Streamed(device, choice.room_bytes)

    def shrink(self) -> bool:
        """Plan for less, with the weights as they are. False where less does not work."""
        whole = self.whole
        found = {choice.part: choice.precision for choice in whole.plan.choices}
        budget = whole.budget
        if whole.plan.vram_peaks:
            peaks = [min(size, peak) for size, peak in zip(budget.cards, whole.plan.vram_peaks, strict=True)]
            budget = replace(budget, vram=tuple(int(SMALLER * peak) for peak in peaks))
        else:
            base = whole.plan.base_bytes
            budget = replace(budget, ram=base + int(SMALLER * (min(budget.ram_bytes, whole.plan.ram_peak) - base)))
        sizing = whole.sizing.with_fixed(found)
        try:
            made = plan(sizing.parts(), budget, sizing.machine, count=sizing.workload.count)
        except ValueError as error:
            log.info("There is no plan for less memory: %s", error)
            return False
        whole.sizing, whole.budget, whole.plan = sizing, budget, made
        return True

    def fetch(self, networks: Iterable[tuple[str, Any]], *, during: str) -> None:
        """Begin to read what comes next, if main memory has room for it beside what is at work."""
        current = self.whole.plan
        busy = current.busy_bytes(during) if during in current else 0
        kept = sum(c.num_bytes for c in current.choices if c.is_kept and c.place != "card")
        room = self.whole.budget.ram_bytes - current.base_bytes - kept - busy
        for name, network in networks:
            if name in current and not current[name].is_kept and current[name].num_bytes <= room:
                room -= current[name].num_bytes
                fetch_ahead(network)


def _device(card: int) -> torch.device:
    device = accelerator() or torch.device("cpu")
    return torch.device(device.type, card) if card else device


def managed(
    models: Sequence[str | os.PathLike[str]],
    memory: Memory,
    *,
    variant: str | None = None,
    dtype: Any = None,
    given: Iterable[str] = (),
    workload: Workload | None = None,
    machine: Machine | None = None,
    quantization: Any = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Managed:
    """A cascade's plan. `given` components are not the plan's; what the caller says of precision is kept."""
    sizing = Sizing.of_models(models, machine=machine or this_machine(), workload=workload, variant=variant)
    if presets is not None:
        sizing = replace(sizing, presets=presets)
    return _managed(sizing, memory, dtype, quantization, given)


def managed_one(
    model: str | os.PathLike[str],
    memory: Memory,
    *,
    variant: str | None = None,
    dtype: Any = None,
    given: Iterable[str] = (),
    quantization: Any = None,
    **hub_options: Any,
) -> Managed:
    """A single pipeline's."""
    found = described(model, variant=variant, **hub_options)
    sizing = Sizing({STAGES[0]: found}, Workload(is_one_stage=True), this_machine())
    return _managed(sizing, memory, dtype, quantization, given)


def _managed(sizing: Sizing, memory: Memory, dtype: Any, quantization: Any, given: Iterable[str]) -> Managed:
    absent = set(given)
    stages = {
        name: replace(one, components={n: c for n, c in one.components.items() if n == "unet" or n not in absent})
        for name, one in sizing.stages.items()
    }
    sizing = replace(sizing, stages=stages)
    fixed = {}
    for part in sizing.parts():
        component = part.name.rpartition(".")[2]
        said = _of(dtype, component)
        packed = _of(quantization, component)
        if said is not None or packed is not None:
            usual = part.precisions[0].dtype if said is None else str(as_dtype(said)).removeprefix("torch.")
            fixed[part.name] = Precision(usual, packed)
    return Managed.of(sizing.with_fixed(fixed), memory)


def _of(said: Any, component: str) -> Any:
    return said.get(component, said.get("default")) if isinstance(said, Mapping) else said


# ----------------------------------------------------------------------------------------------- when it was too little


def second_try(stage: Painter, work: Callable[[], R], *, generators: Any = None) -> R:
    """Do it; where memory runs out, make room and do it once more, with the same draws."""
    states = states_of(generators)
    try:
        return work()
    except torch.OutOfMemoryError as error:
        told = first_line(error)
    # The error is gone by now, and with its frames the tensors that they held.
    make_room(stage, told)
    restore(generators, states)
    return work()


def make_room(stage: Painter, told: str) -> None:
    """Free what is free, and use less from now on."""
    release()
    is_planned = stage.memory is not None and stage.memory.shrink()
    stage.use_less(is_planned=is_planned)
    log.warning(
        "Out of memory (%s). What could be freed is freed, and it is tried once more with %s. To begin with less, pass "
        "memory= to from_pretrained, such as memory='6GB'.",
        told,
        "a smaller plan" if is_planned else "the batch in pieces",
    )


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


def states_of(generators: Any) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _listed(generators)]


def restore(generators: Any, states: list[torch.Tensor]) -> None:
    for generator, state in zip(_listed(generators), states, strict=True):
        generator.set_state(state)


def _listed(generators: Any) -> list[torch.Generator]:
    if generators is None:
        return []
    return [generators] if isinstance(generators, torch.Generator) else list(generators)
