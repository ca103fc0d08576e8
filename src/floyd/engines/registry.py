"""Engines by name, or the fastest that computes the same.

B images  C channels  H height  W width  Z, h, w the same of latents  L text tokens  E encoder width
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from floyd.engines import native
from floyd.engines.plain import check_network
from floyd.errors import EngineError
from floyd.models.unet import UNet2DConditionModel
from floyd.runtime.budget import free_ram

AUTO = "auto"
BEST = "winograd"  # what "auto" is where it runs
_PACKED = 4  # times a network's bytes, which it holds beside it
_HOMES = {"winograd": "floyd.engines.winograd", "openvino": "floyd.engines.openvino"}
Made = TypeVar("Made")


class Engine(Protocol):
    """What runs a UNet in its place: the same two methods, with a context of its own."""

    unet: Any
    config: Any

    def read(
        self, text_BLE: Tensor, class_labels: Tensor | None = None, encoder_attention_mask: Tensor | None = None
    ) -> Any: ...

    def step(self, sample: Tensor, timestep: Tensor | float, context: Any) -> Tensor: ...


class Decoder(Protocol):
    """What decodes latents in a VAE's place."""

    vae: Any

    def __call__(self, z_BZhw: Tensor) -> Tensor:
        """Latents as the VAE's decoder takes them, [B, Z, h, w], to pixels, [B, C, H, W]; float32."""


def engine_names() -> list[str]:
    return list(_HOMES)


def prepared(name: str, unet: nn.Module, **options: Any) -> Engine:
    """The engine of that name for this network. EngineError: not on this machine, or not for this network."""
    if name not in _HOMES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, (AUTO, *_HOMES)))}, got {name!r}.")
    make: Callable[..., Engine] = import_module(_HOMES[name]).prepared
    return make(unet, **options)


def engine_for(name: str, unet: nn.Module, made: Engine | None = None, **options: Any) -> Engine | None:
    """`made` before if it is this network's, or one made now.

    "auto" is "winograd" where it runs the network as it is now, and None elsewhere: it needs a compiler, and plain
    weights in float32 on the CPU that packed fill no more than half of the memory that is free.
    """
    if made is not None and made.unet is not unet:
        made = None
    if name != AUTO:
        return made or prepared(name, unet, **options)
    if options:
        raise ValueError(f"The engine 'auto' takes no options, got {', '.join(options)}: name the engine.")
    return _if_plain(unet, lambda: engine_for(BEST, unet, made)) if made or _is_small(unet) else None


def decoder_for(name: str, vae: nn.Module, made: Decoder | None = None) -> Decoder | None:
    """What that engine has for a VAE's decoder, likewise: "openvino" has nothing."""
    if name == AUTO:
        return _if_plain(vae, lambda: decoder_for(BEST, vae, made))
    if name != "winograd":
        return None
    if made is None or made.vae is not vae:
        made = import_module("floyd.engines.decoder").prepared(vae)
    return made


def _if_plain(network: nn.Module, make: Callable[[], Made | None]) -> Made | None:
    if not native.are_here():
        return None
    try:
        check_network(network)
        return make()
    except EngineError:
        return None


def _is_small(unet: nn.Module) -> bool:
    room = free_ram()
    needed = _PACKED * sum(weight.nbytes for weight in unet.parameters())
    return isinstance(unet, UNet2DConditionModel) and (room is None or needed <= room / 2)
