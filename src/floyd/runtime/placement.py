"""Where the weights lie while they are used: a promise made and undone with `with`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M")


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
        yield module

    def device_of(self, module: object) -> torch.device:
        return device_of(module)


@dataclass(frozen=True)
class OneAtATime:
    """Only the component in use is on the device."""

    device: torch.device

    @contextmanager
    def use(self, module: M) -> Iterator[M]:
        if not isinstance(module, nn.Module):
            yield module
            return
        home = device_of(module)
        module.to(self.device)
        try:
            yield module
        finally:
            module.to(home)

    def device_of(self, module: object) -> torch.device:
        return self.device if isinstance(module, nn.Module) else device_of(module)


@dataclass(frozen=True)
class LayerByLayer:
    """Only the layer in use is on the device: slow, and needs almost no memory there."""

    device: torch.device

    @contextmanager
    def use(self, module: M) -> Iterator[M]:
        if not isinstance(module, nn.Module):
            yield module
            return
        home = device_of(module)
        handles = [module.register_forward_pre_hook(self._bring_inputs, with_kwargs=True, prepend=True)]
        try:
            for layer in module.modules():
                if next(layer.children(), None) is None:
                    handles.append(layer.register_forward_pre_hook(self._bring))
                    handles.append(layer.register_forward_hook(_taking(home), always_call=True))
                else:  # weights of its own are read by methods that no hook sees
                    layer._apply(self._here, recurse=False)
            yield module
        finally:
            for handle in handles:
                handle.remove()
            module.to(home)

    def device_of(self, module: object) -> torch.device:
        return self.device if isinstance(module, nn.Module) else device_of(module)

    def _bring(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        layer.to(self.device)

    def _bring_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(self._here(arg) for arg in args), {key: self._here(value) for key, value in kwargs.items()}

    def _here(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value


def _taking(home: torch.device) -> Any:
    def take(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layer.to(home)

    return take


def device_of(module: object) -> torch.device:
    """Where a module's first weight lies; the CPU for what has none."""
    if isinstance(module, nn.Module):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    device = getattr(module, "device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")


def accelerator() -> torch.device | None:
    """The machine's accelerator, if it has one."""
    if not torch.accelerator.is_available():
        return None
    return torch.accelerator.current_accelerator(check_available=True)


def best_device() -> torch.device:
    return accelerator() or torch.device("cpu")
