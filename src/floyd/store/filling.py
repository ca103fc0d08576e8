"""Networks on the meta device get their weights one by one, in fewer bits if so asked: never all at once in full.

How weights are kept in fewer bits is the business of `floyd.runtime`, which this room does not know: like the classes
of `layout`, it is named here and imported when it is asked for.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from floyd.errors import CheckpointError
from floyd.store.weights import some

KEY = "quantization_config"  # of a component's configuration file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantization:
    """In which scheme weights are to be kept, and whether the files hold them so already."""

    name: str
    is_stored: bool


def quantizing() -> Any:
    """The module that knows how."""
    return importlib.import_module("floyd.runtime.quantize")


def quantization_for(config: Mapping[str, Any], asked: str | None, place: object) -> Quantization | None:
    """What `config` says of the files, and the caller wants; None for plain weights."""
    if asked is not None:
        quantizing().scheme_named(asked)
    stored = quantizing().named_in(config)
    if stored is None:
        return None if asked is None else Quantization(asked, is_stored=False)
    if asked not in (None, stored):
        raise ValueError(
            f"{place} is kept as {stored} and cannot become {asked}: leave quantization out, or take the plain weights."
        )
    return Quantization(stored, is_stored=True)


def fill(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    place: str,
    quantization: Quantization | None = None,
    tied: Collection[str] = (),
) -> None:
    """Every weight of the network from the state dict, cast to `dtype`, or kept as `quantization` says.

    Read in the order of the state dict, each once. `tied`: keys that the network fills by itself.
    """
    plain = dict(model.state_dict())
    layers = {} if quantization is None else quantizing().prepare(model, quantization.name)
    is_stored = quantization is not None and quantization.is_stored
    wanted = {key: t for key, t in (model.state_dict() if is_stored else plain).items() if key not in tied}
    recomputed = {name for name, _ in model.named_buffers()} - wanted.keys()
    keys = [key for key in state if key not in recomputed and key not in tied]
    _check_keys(wanted.keys(), set(keys), f"{place} does not fit {type(model).__name__}")
    parameters = {name for name, _ in model.named_parameters()} | {f"{name}.weight" for name in layers}
    for name, layer in layers.items():
        layer.like = torch.empty(0, dtype=_precision(model, f"{name}.weight", dtype))
        if not is_stored:
            layer.make_room()
    for key in keys:
        name, _, last = key.rpartition(".")
        tensor, own = state[key], wanted[key]
        if tensor.shape != own.shape:
            raise CheckpointError(f"{place}: {key} is {tuple(tensor.shape)}, expected {tuple(own.shape)}.")
        if name in layers and last != "bias":
            _take(layers[name], last, _checked(tensor, key, own if is_stored else None, place))
        elif key in parameters and own.is_floating_point():
            _assign(model, key, _checked(tensor, key, None, place).to(_precision(model, key, dtype)))
        else:
            _assign(model, key, tensor.to(own.dtype))
    if left := [
        name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta and name not in tied
    ]:
        raise CheckpointError(f"{place} left {some(left)} of {type(model).__name__} without weights.")


def _check_keys(wanted: Collection[str], given: Collection[str], complaint: str) -> None:
    problems = []
    if missing := set(wanted) - set(given):
        problems.append(f"missing: {some(missing)}")
    if unexpected := set(given) - set(wanted):
        problems.append(f"unexpected: {some(unexpected)}")
    if problems:
        raise CheckpointError(f"{complaint}; {'; '.join(problems)}. Are config.json and the weights of one network?")


def _checked(tensor: Tensor, key: str, stored: Tensor | None, place: str) -> Tensor:
    if stored is not None and tensor.dtype != stored.dtype:
        raise CheckpointError(f"{place}: {key} is stored as {tensor.dtype}, expected {stored.dtype}.")
    if stored is None and not tensor.is_floating_point():
        raise CheckpointError(
            f"{place} is quantized: {key} is stored as {tensor.dtype}. Load the plain or fp16 weights and quantize "
            "those."
        )
    return tensor


def _take(layer: Any, what: str, tensor: Tensor) -> None:
    if what == "weight":
        layer.take(tensor)
    else:
        setattr(layer, what, tensor)


def _assign(model: nn.Module, key: str, tensor: Tensor) -> None:
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if name in module._parameters:
        old = module._parameters[name]
        module._parameters[name] = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)
    else:
        module._buffers[name] = tensor


def _precision(model: nn.Module, key: str, dtype: torch.dtype) -> torch.dtype:
    """Layers that their network declares to overflow in float16 stay float32 there, as some of T5 do."""
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    return torch.float32 if wide.intersection(key.split(".")) else dtype
