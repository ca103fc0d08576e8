"""LoRA on the layers of one network: put on, chosen, taken off. peft does the arithmetic.

The network is left as it was found: what is trainable stays so, torch's global generator is not drawn from, and when
the last LoRA is gone the layers are the very objects they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from floyd.adapters.calls import CallScaled
from floyd.adapters.factors import Factors, innermost, is_plain

_CONFIGS = "peft_config"  # an attribute of a network, where peft and the incumbent look for what is on it


def peft() -> Any:
    """The library, which takes seconds to load and is not needed until LoRA is."""
    try:
        return import_module("peft")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError("LoRA needs peft, which is not installed: pip install 'floyd-if[lora]'") from error


def lora_layers(network: Any) -> Iterator[tuple[str, Any]]:
    """The layers that have LoRA, by name."""
    if isinstance(network, nn.Module):
        for name, layer in network.named_modules():
            if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) and hasattr(layer, "base_layer"):
                yield name, layer


def names_on(network: Any) -> list[str]:
    """Every LoRA of a network, in the order in which they came."""
    return list(dict.fromkeys(name for _, layer in lora_layers(network) for name in layer.lora_A))


def active_on(network: Any) -> list[str]:
    """Those that act, or would if LoRA were not disabled."""
    there = set(names_on(network))
    active = (name for _, layer in lora_layers(network) for name in layer.active_adapters)
    return [name for name in dict.fromkeys(active) if name in there]


def is_disabled_on(network: Any) -> bool:
    return any(layer.disable_adapters for _, layer in lora_layers(network))


def heeds_calls(network: Any) -> bool:
    """Let LoRA heed `call_scale`, even if peft itself put it on; False where none acts by factors of its own."""
    is_acting = False
    for _, layer in lora_layers(network):
        if not isinstance(layer.scaling, CallScaled):
            layer.scaling = CallScaled(layer.scaling)
        is_on = not layer.disable_adapters and not layer.merged
        is_acting = is_acting or (is_on and any(name in layer.lora_A for name in layer.active_adapters))
    return is_acting


def attach(network: nn.Module, name: str, layers: Mapping[str, Factors]) -> None:
    """Put factors that fit onto their layers, inactive beside what acts already. All of them, or none."""
    before, is_disabled = active_on(network), is_disabled_on(network)
    try:
        with _as_found(network), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of every second LoRA on a network
            _wrap(network, name, layers)
        for path, factors in layers.items():
            _fill(network, path, name, factors)
        activate(network, before)
        enable(network, not is_disabled)
        heeds_calls(network)
    except BaseException:
        remove(network, [name])
        activate(network, before)
        raise


def activate(network: Any, names: Sequence[str]) -> None:
    """From now on these act, and no others."""
    for _, layer in lora_layers(network):
        layer.set_adapter(list(names), inference_mode=True)


def weigh(network: Any, name: str, weight: float) -> None:
    """How strongly one LoRA acts, for every call."""
    for _, layer in lora_layers(network):
        layer.set_scale(name, weight)


def enable(network: Any, is_enabled: bool) -> None:
    with _as_found(network):
        for _, layer in lora_layers(network):
            layer.enable_adapters(is_enabled)


def remove(network: Any, names: Sequence[str]) -> None:
    """Take these LoRAs off; a layer that has none left is itself again."""
    activate(network, [name for name in active_on(network) if name not in names])
    for path, layer in list(lora_layers(network)):
        for name in names:
            layer.delete_adapter(name)
        if not layer.lora_A:
            network.set_submodule(path, layer.base_layer)
    if left := {n: config for n, config in getattr(network, _CONFIGS, {}).items() if n not in names}:
        setattr(network, _CONFIGS, left)
    elif hasattr(network, _CONFIGS):
        delattr(network, _CONFIGS)


def layers_on(network: Any, name: str) -> dict[str, Factors]:
    """The factors of one LoRA, with the strength it was loaded with."""
    layers = {}
    for path, layer in lora_layers(network):
        if name in layer.lora_A:
            down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
            alpha = float(layer.lora_alpha[name]) * (len(down) ** 0.5 if layer.use_rslora.get(name) else 1)
            layers[path] = Factors(down, up, alpha)
    return layers


def _wrap(network: nn.Module, name: str, layers: Mapping[str, Factors]) -> None:
    """Give the layers room for LoRA, without weights yet."""
    library = peft()
    config = library.LoraConfig(**_described(layers), init_lora_weights=False, inference_mode=True)
    known = {path for path in layers if is_plain(innermost(network.get_submodule(path)))}
    if known:
        keys = {f"{path}.lora_A.weight": None for path in known}
        library.inject_adapter_in_model(config, network, adapter_name=name, state_dict=keys)
    for path in layers.keys() - known:
        any_linear: Any = import_module("floyd.adapters.any_linear").AnyLinear
        layer, own = network.get_submodule(path), {"r": layers[path].rank, "lora_alpha": layers[path].alpha}
        if hasattr(layer, "base_layer"):
            layer.update_layer(name, **own, config=config)  # type: ignore[operator]
        else:
            network.set_submodule(path, any_linear(layer, name, **own, config=config))
    setattr(network, _CONFIGS, {**getattr(network, _CONFIGS, {}), name: config})


def _described(layers: Mapping[str, Factors]) -> dict[str, Any]:
    """As keywords of peft's `LoraConfig`, whose patterns are regular expressions that a name is matched with."""
    first = next(iter(layers.values()))
    return {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {f"^{path}": f.rank for path, f in layers.items() if f.rank != first.rank},
        "alpha_pattern": {f"^{path}": f.alpha for path, f in layers.items() if f.alpha != first.alpha},
        "target_modules": sorted(layers),
    }


def _fill(network: nn.Module, path: str, name: str, factors: Factors) -> None:
    layer: Any = network.get_submodule(path)
    base = innermost(layer)
    device, dtype = _place_of(base, network)
    for part, factor in ((layer.lora_A[name], factors.down), (layer.lora_B[name], factors.up)):
        part.weight = nn.Parameter(factor.detach().to(device, dtype, copy=True), requires_grad=False)
    layer.train(base.training)


def _place_of(base: nn.Module, network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where LoRA of a layer belongs, and in which precision: its own, or the network's where it is quantized."""
    own = [tensor for tensor in (*base.parameters(), *base.buffers()) if not tensor.is_meta]
    rest = [tensor for tensor in (*network.parameters(), *network.buffers()) if not tensor.is_meta]
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        dtype = weight.dtype
    else:
        dtype = next((tensor.dtype for tensor in rest if tensor.is_floating_point()), torch.float32)
    return (own or rest)[0].device if own or rest else torch.device("cpu"), dtype


@contextmanager
def _as_found(network: Any) -> Iterator[None]:
    """peft freezes and unfreezes as it goes; afterwards every parameter is as trainable as it was."""
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
