"""Engines by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

_HOMES = {"winograd": "floyd.engines.winograd", "openvino": "floyd.engines.openvino"}


class Engine(Protocol):
    """What runs a UNet in its place: the same two methods, with a context of its own."""

    unet: Any
    config: Any

    def read(
        self, text_BLE: Tensor, class_labels: Tensor | None = None, encoder_attention_mask: Tensor | None = None
    ) -> Any: ...

    def step(self, sample: Tensor, timestep: Tensor | float, context: Any) -> Tensor: ...


def engine_names() -> list[str]:
    return list(_HOMES)


def prepared(name: str, unet: nn.Module, **options: Any) -> Engine:
    """The engine of that name for this network. EngineError: not on this machine, or not for this network."""
    if name not in _HOMES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, _HOMES))}, got {name!r}.")
    make: Callable[..., Engine] = import_module(_HOMES[name]).prepared
    return make(unet, **options)


def prepared_decoder(name: str, vae: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What that engine has for a VAE's decoder: "openvino" has nothing. EngineError: as above."""
    if name != "winograd":
        return None
    made: Callable[[Tensor], Tensor] = import_module("floyd.engines.decoder").prepared(vae)
    return made
