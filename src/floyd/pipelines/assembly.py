"""Networks that belong together, and where they lie."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from floyd.pipelines.recalling import Lent
from floyd.runtime.placement import (
    LayerByLayer,
    OneAtATime,
    Placement,
    WhereTheyAre,
    accelerator,
    device_of,
    is_settled,
    is_spread,
    reachable,
    rest,
    send,
)
from floyd.runtime.sleeping import is_asleep, release, wake
from floyd.runtime.switches import Switches
from floyd.store.weights import has_adapters
from floyd.text.cache import TextCache

if TYPE_CHECKING:
    from floyd.pipelines.memory import Managed

log = logging.getLogger(__name__)


class Assembly:
    """Named components of which the networks are moved, cast, lent and unloaded together."""

    component_names: ClassVar[tuple[str, ...]] = ()

    memory: Managed | None = None  # the plan that says where the networks lie
    text_cache: TextCache | None = None  # of prompts that were read
    _placement: Placement = WhereTheyAre()
    _switches: Switches | None = None

    @property
    def components(self) -> dict[str, Any]:
        """By name, as another pipeline's constructor takes them: `IFImg2ImgPipeline(**pipe.components)`."""
        return {name: getattr(self, name) for name in self.component_names}

    def to(self, *args: Any, device: Any = None, dtype: torch.dtype | None = None) -> Self:
        """Move all networks to a device, cast them to a dtype, or both; in place. Ends offloading."""
        for argument in args:
            if isinstance(argument, torch.dtype) and dtype is None:
                dtype = argument
            elif isinstance(argument, str | int | torch.device) and device is None:
                device = argument
            elif argument is not None:
                raise TypeError(f"to() takes a device, a dtype or both, got {argument!r}.")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"The dtype of a pipeline must be a floating one, got {dtype}.")
        if device is not None:
            device = reachable(device)
            self._place(WhereTheyAre())
            self.memory = None
        for name, module in self._modules():
            wake(module)
            if is_spread(module):
                log.info("%s was spread over devices as it was loaded: it stays there, as it is.", name)
            elif getattr(module, "is_quantized", False):
                _move_quantized(name, module, device, dtype)
            else:
                send(module, device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the first network lies; with offloading, where it computes."""
        modules = [module for _, module in self._modules()]
        return self._placement.device_of(modules[0]) if modules else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        parameters = (p.dtype for _, module in self._modules() for p in module.parameters() if p.is_floating_point())
        return next(parameters, torch.float32)

    @property
    def switches(self) -> Switches:
        """The ways of computing faster that are on. Set `Switches(...)`, or None for what is best for the device, and
        for the memory where there is a plan of it."""
        if self._switches is not None:
            return self._switches
        best = Switches.best_for(self.device)
        return best if self.memory is None or self.memory.copies("unet") else best.without_copies()

    @switches.setter
    def switches(self, switches: Switches | None) -> None:
        if not isinstance(switches, Switches | None):
            raise TypeError(f"switches are a floyd.runtime.switches.Switches or None, got {switches!r}.")
        self._switches = switches

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep all networks in main memory, and on the accelerator only the one in use."""
        self._offload(OneAtATime, gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep all networks in main memory, and on the accelerator only the layer in use: slow, but smallest."""
        self._offload(LayerByLayer, gpu_id, device)

    def _offload(
        self, plan: type[OneAtATime] | type[LayerByLayer], gpu_id: int | None, device: torch.device | str | None
    ) -> None:
        target = accelerator() if device is None else reachable(device)
        if target is None or target.type == "cpu":
            log.info("There is no accelerator to offload from: everything stays in main memory.")
            return
        if gpu_id is not None:
            target = torch.device(target.type, gpu_id)
        for _, module in self._modules():
            wake(module)
            if not is_settled(module):
                module.to("cpu")
        self.memory = None
        self._place(plan(target))

    def _place(self, placement: Placement) -> None:
        self._placement = placement

    def _modules(self) -> list[tuple[str, nn.Module]]:
        return [(name, module) for name, module in self.components.items() if isinstance(module, nn.Module)]

    def _lent_encoder(
        self, positive: Tensor | None, negative: Tensor | None, *, is_guided: bool, is_steady: bool
    ) -> Lent:
        """The text encoder for the length of a call, which is told its embeddings or has to read for them.

        With LoRA no cache serves: what it says depends on the call.
        """
        encoder = self.components["text_encoder"]
        is_adapted = isinstance(encoder, nn.Module) and has_adapters(encoder)
        cache = None if is_adapted else self.text_cache
        is_read = positive is None or (is_guided and negative is None)
        return Lent(self._placement, encoder, cache, is_steady=is_steady, is_read=is_read)

    def _device_for(self, *modules: object) -> torch.device:
        """Where the first of these that is present computes."""
        present = next((module for module in modules if module is not None), None)
        return torch.device("cpu") if present is None else self._placement.device_of(present)

    def manage(self, memory: Managed) -> None:
        """Let a plan say where the networks lie."""
        self.memory = memory
        networks = dict(self._modules())
        for name, network in networks.items():
            home = memory.home(name)
            if not is_asleep(network) and device_of(network) != home and memory.choice(name) is not None:
                network.to(home)
        self._place(memory.placement(networks))

    def unload(self) -> None:
        """Let go of the memory of all networks, the accelerator's and main memory.

        The pipeline stays whole: a network that came from a checkpoint is read from it again when it is next used, as
        it was loaded. What was given to the constructor is known from nowhere else, and moves to main memory.
        """
        for _, module in self._modules():
            if next(module.parameters(), None) is not None:  # a watermark is a picture, and always at hand
                rest(module)
        release()


def _move_quantized(name: str, module: nn.Module, device: Any, dtype: torch.dtype | None) -> None:
    """A quantized network keeps its precision, and most of them refuse even to be moved where they already are."""
    if dtype is not None:
        log.warning("%s is quantized: it keeps its precision.", name)
    if device is not None and torch.device(device).type != device_of(module).type:
        module.to(device=device)
