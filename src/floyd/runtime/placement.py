"""Where the weights lie while they are used: a promise made and undone with `with`.

Calls at the same time share what they use: the first brings it, the last takes it home.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock, RLock
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from floyd.runtime.clock import part
from floyd.runtime.sleeping import after_use, can_sleep, home_of, put_to_sleep, wake

M = TypeVar("M")

_CPU = torch.device("cpu")


class Placement(Protocol):
    def use(self, module: M) -> AbstractContextManager[M]:
        """The module, ready to compute for as long as the block lasts; afterwards it lies where it lay."""

    def device_of(self, module: object) -> torch.device:
        """Where the inputs of a module in use must lie."""


@dataclass(frozen=True)
class WhereTheyAre:
    """Nothing moves."""

    @contextmanager
    def use(self, module: M) -> Iterator[M]:
        if not isinstance(module, nn.Module) or is_settled(module):
            yield module
            return
        with shared(module, self, _left_alone):
            yield module

    def device_of(self, module: object) -> torch.device:
        return device_of(module)


class Visits(ABC):
    """What placements share that bring a network to a device for its use: how is their own."""

    device: torch.device

    @contextmanager
    def use(self, module: M) -> Iterator[M]:
        if not isinstance(module, nn.Module) or is_settled(module):
            yield module
            return
        with shared(module, self, self.visit):
            yield module

    def device_of(self, module: object) -> torch.device:
        return device_of(module) if not isinstance(module, nn.Module) or is_settled(module) else self.device

    @abstractmethod
    def visit(self, module: nn.Module) -> AbstractContextManager[None]:
        """Bring it, and take it home at the end of the block."""


@dataclass(frozen=True)
class OneAtATime(Visits):
    """Only the component in use is on the device."""

    device: torch.device

    @contextmanager
    def visit(self, module: nn.Module) -> Iterator[None]:
        home = device_of(module)
        kept = _Kept.all_of(module)
        try:
            module.to(self.device)
            for one in kept:
                one.begin()
            yield
        finally:
            for one in kept:
                one.end()
            module.to(home)  # what was changed or put in its place on the device; the rest is there already


class _Kept:
    """A weight or a buffer that main memory keeps while the device has a copy: going home is to point at it again.

    One that was written to on the device, or replaced, is left to be copied.
    """

    def __init__(self, rows: dict[str, Any], name: str) -> None:
        self.rows, self.name, self.tensor = rows, name, rows[name]
        self.host = None if self.tensor is None else self.tensor.data
        self.visitor, self.version = self.tensor, -1

    @classmethod
    def all_of(cls, module: nn.Module) -> list[_Kept]:
        tables: list[dict[str, Any]] = [t for own in module.modules() for t in (own._parameters, own._buffers)]
        return [cls(rows, name) for rows in tables for name in rows]

    def begin(self) -> None:
        self.visitor = self.rows.get(self.name)
        self.version = -1 if self.visitor is None else self.visitor._version

    def end(self) -> None:
        now = self.rows.get(self.name)
        if self.host is None or now is not self.visitor or now is None or now._version != self.version:
            return
        if now is self.tensor:
            now.data = self.host
        else:  # some devices have tensors of their own kind, and a module that moves there other objects
            self.rows[self.name] = self.tensor


@dataclass(frozen=True)
class LayerByLayer(Visits):
    """Only the layer in use is on the device: slow, and needs almost no memory there."""

    device: torch.device

    @contextmanager
    def visit(self, module: nn.Module) -> Iterator[None]:
        home = device_of(module)
        handles = [module.register_forward_pre_hook(bring_inputs(self.device), with_kwargs=True, prepend=True)]
        try:
            for layer in module.modules():
                if next(layer.children(), None) is None:
                    errand = _Errand(self.device, home)
                    handles.append(layer.register_forward_pre_hook(errand.bring))
                    handles.append(layer.register_forward_hook(errand.take, always_call=True))
                else:  # weights of its own are read by methods that no hook sees
                    layer._apply(self._here, recurse=False)
            yield
        finally:
            for handle in handles:
                handle.remove()
            module.to(home)

    def _here(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value


def bring_inputs(device: torch.device) -> Callable[..., Any]:
    """A hook for a network whose weights are brought piece by piece: its tensors come along."""

    def here(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def bring(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(here(arg) for arg in args), {key: here(value) for key, value in kwargs.items()}

    return bring


class _Errand:
    """Brings a layer for its work and takes it home after; of calls at the same time the last one does."""

    def __init__(self, device: torch.device, home: torch.device) -> None:
        self.device, self.home = device, home
        self.lock = Lock()
        self.num_users = 0
        self.kept: list[_Kept] = []

    def bring(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        with part("transfers", count=0), self.lock:
            self.num_users += 1
            if self.num_users == 1:
                self.kept = _Kept.all_of(layer)
                layer.to(self.device)
                for one in self.kept:
                    one.begin()

    def take(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        with part("transfers", count=0), self.lock:
            self.num_users -= 1
            if self.num_users == 0:
                for one in self.kept:
                    one.end()
                layer.to(self.home)


@dataclass(eq=False)
class _Stay:
    """A module in use."""

    plan: Placement
    visit: AbstractContextManager[None]
    num_users: int = 0


_STAYS: WeakKeyDictionary[nn.Module, _Stay] = WeakKeyDictionary()
_MOVING = RLock()  # held while weights move, not while they are used; moving may end a forgotten iterator's use


@contextmanager
def shared(
    module: object, plan: Placement, visit: Callable[[nn.Module], AbstractContextManager[None]]
) -> Iterator[None]:
    """Within the block the module lies where the plan puts it, for all who use it: a visit begins with the first of
    them and ends with the last. No thread waits for another's use, nor must the one that begins it end it."""
    if not isinstance(module, nn.Module):
        yield
        return
    with part("transfers", count=0), _MOVING:
        stay = _STAYS.get(module)
        if stay is None:
            wake(module)
            stay = _Stay(plan, visit(module))
            stay.visit.__enter__()
            _STAYS[module] = stay
        elif stay.plan != plan:
            raise RuntimeError(
                f"A {type(module).__name__} is in use as {stay.plan} and cannot be used as {plan} at the same time: "
                "give all pipelines that share it the same offloading, or call them one after the other."
            )
        stay.num_users += 1
    try:
        yield
    finally:
        with part("transfers", count=0), _MOVING:
            stay.num_users -= 1
            if stay.num_users == 0:
                del _STAYS[module]
                stay.visit.__exit__(None, None, None)
                after_use(module)


def rest(module: nn.Module) -> None:
    """Its weights leave memory until they are used again; those of which nobody knows where to read them stay in main
    memory."""
    with _MOVING:
        if module in _STAYS:
            raise RuntimeError(
                f"A {type(module).__name__} is in use and cannot be unloaded: wait for the call, or end it."
            )
        if can_sleep(module):
            put_to_sleep(module)
        elif not is_settled(module):
            module.to("cpu")


@contextmanager
def _left_alone(module: nn.Module) -> Iterator[None]:
    yield


def is_settled(module: nn.Module) -> bool:
    """Whether a module's place is not ours to change: it is quantized, or spread over devices by accelerate."""
    return bool(getattr(module, "is_quantized", False)) or is_spread(module)


def is_spread(module: object) -> bool:
    """Whether accelerate keeps parts of a module on different devices, or on disk."""
    return len(set((getattr(module, "hf_device_map", None) or {}).values())) > 1


def device_of(module: object) -> torch.device:
    """Where a module's first weight lies; the CPU for what has none."""
    if is_spread(module):  # it computes on the accelerator, and what lies elsewhere is brought there
        spread: Any = module
        return next((torch.device(d) for d in spread.hf_device_map.values() if d not in ("cpu", "disk")), _CPU)
    if isinstance(module, nn.Module):
        if (home := home_of(module)) is not None:
            return home
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    device = getattr(module, "device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")


def send(module: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
    """To a device, a dtype or both. Layers that their network declares to overflow in float16, as some of T5 do, are
    float32 there, as they are when a checkpoint is loaded in float16."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    if not kept:
        module.to(device=device, dtype=dtype)
        return
    for name, layer in module.named_modules():
        own = torch.float32 if kept.intersection(name.split(".")) else dtype
        layer._apply(partial(_sent, device=device, dtype=own), recurse=False)


def _sent(x: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    return x.to(device=device, dtype=dtype if x.is_floating_point() else None)


def accelerator() -> torch.device | None:
    """The machine's accelerator, if it has one."""
    if not torch.accelerator.is_available():
        return None
    return torch.accelerator.current_accelerator(check_available=True)


def best_device() -> torch.device:
    return accelerator() or torch.device("cpu")


def reachable(device: torch.device | str | int) -> torch.device:
    """The device, if this machine and this torch have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # torch has no one word for it
        here = ", ".join(dict.fromkeys(["cpu", str(best_device().type)]))
        raise ValueError(
            f"This machine cannot compute on {str(device)!r}: torch {torch.__version__} finds {here} here. Name one of "
            "these, or leave the choice to 'auto'."
        ) from error


@dataclass(frozen=True)
class Stays:
    """A network lies on a device for good: only one that sleeps has to be brought there, by those who know how to wake
    it."""

    device: torch.device

    @contextmanager
    def use(self, module: M) -> Iterator[M]:
        with shared(module, self, _left_alone):
            yield module

    def device_of(self, module: object) -> torch.device:
        return self.device if isinstance(module, nn.Module) else device_of(module)


@dataclass(frozen=True, eq=False)
class Assigned:
    """Each network has a placement of its own."""

    general: Placement
    own: Mapping[nn.Module, Placement]

    def of(self, module: object) -> Placement:
        return self.own.get(module, self.general) if isinstance(module, nn.Module) else self.general

    def use(self, module: M) -> AbstractContextManager[M]:
        return self.of(module).use(module)

    def device_of(self, module: object) -> torch.device:
        return self.of(module).device_of(module)
