"""LoRA in every format that there is, and what it must do: the weights it amounts to, merged by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
T5_LAYERS = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")


class Lora(NamedTuple):
    """One layer's."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def delta(self) -> Tensor:
        """What the layer's weight grows by."""
        rank = len(self.down)
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return product.unflatten(1, self.down.shape[1:]) * ((rank if self.alpha is None else self.alpha) / rank)


Layers = dict[str, Lora]
State = dict[str, Tensor]


def made_up(network: nn.Module, endings: Iterable[str] = ATTENTION, *, ranks: tuple[int, ...] = (2,), seed: int = 0,
            alpha: float | None = None) -> Layers:  # fmt: skip
    """Random LoRA for the layers of a network whose names end so; layers take the ranks in turn."""
    generator = torch.Generator().manual_seed(seed)
    layers: Layers = {}
    for name, layer in network.named_modules():
        if any(f".{name}".endswith(f".{ending}") for ending in endings):
            rank = ranks[len(layers) % len(ranks)]
            inputs, outputs, kernel = sizes(layer)
            down = torch.randn(rank, inputs, *kernel, generator=generator) * 0.2
            up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=generator) * 0.2
            layers[name] = Lora(down, up, alpha)
    assert layers
    return layers


def sizes(layer: Any) -> tuple[int, int, tuple[int, ...]]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels, tuple(layer.kernel_size)
    return layer.in_features, layer.out_features, ()


def merged(network: Any, *loras: tuple[Mapping[str, Lora], float]) -> Any:
    """A copy of the network with LoRA, each as strong as said, added to its weights."""
    copy = deepcopy(network)
    with torch.no_grad():
        for layers, strength in loras:
            for name, lora in layers.items():
                weight = copy.get_submodule(name).weight
                weight += (strength * lora.delta).to(weight.dtype)
    return copy


# ------------------------------------------------------------------------------------------------------------- formats


def peft(layers: Layers, component: str = "unet") -> State:
    return _written(layers, lambda name: (f"{component}.{name}.lora_A.weight", f"{component}.{name}.lora_B.weight"))


def mid_2023(layers: Layers, component: str = "unet") -> State:
    ending = "lora" if component == "unet" else "lora_linear_layer"
    return _written(layers, lambda name: tuple(f"{component}.{name}.{ending}.{role}.weight" for role in ("down", "up")))


def mixed(layers: Layers, component: str = "unet") -> State:
    """What the incumbent writes today: its table does not know `add_k_proj` and `add_v_proj`."""
    ours = {name: lora for name, lora in layers.items() if ".add_" in name}
    state = peft(ours, component) | mid_2023({n: lo for n, lo in layers.items() if n not in ours}, component)
    return dict(sorted(state.items()))


def spring_2023(layers: Layers, component: str = "unet") -> State:
    def keys(name: str) -> tuple[str, ...]:
        parent, _, leaf = name.removesuffix(".0").rpartition(".")
        return tuple(f"{component}.{parent}.processor.{leaf}_lora.{role}.weight" for role in ("down", "up"))

    return _written(layers, keys)


def kohya(layers: Layers, component: str = "unet") -> State:
    start = {"unet": "lora_unet", "text_encoder": "lora_te"}[component]
    names = {name: f"{start}_{name.replace('.', '_')}" for name in layers}
    state = _written(layers, lambda name: tuple(f"{names[name]}.lora_{role}.weight" for role in ("down", "up")))
    alphas = {n: torch.tensor(len(lo.down) if lo.alpha is None else lo.alpha) for n, lo in layers.items()}
    return state | {f"{names[name]}.alpha": alpha.float() for name, alpha in alphas.items()}


FORMATS: dict[str, Callable[..., State]] = {
    "peft": peft,
    "mid_2023": mid_2023,
    "mixed": mixed,
    "spring_2023": spring_2023,
    "kohya": kohya,
}


def _written(layers: Layers, keys: Callable[[str], tuple[str, ...]]) -> State:
    state: State = {}
    for name, lora in layers.items():
        down, up = keys(name)
        state |= {down: lora.down, up: lora.up}
    return state
