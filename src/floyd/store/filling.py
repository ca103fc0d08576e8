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
from floyd.store.lazy import LazyState, Renamed
from floyd.store.pages import cast
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
) -> None:
    """Every weight of the network from the state dict, cast to `dtype`, or kept as `quantization` says.

    Read in the order of the state dict, each once.
    """
    plain = dict(model.state_dict())
    layers = {} if quantization is None else quantizing().prepare(model, quantization.name)
    is_stored = quantization is not None and quantization.is_stored
    wanted = set(model.state_dict() if is_stored else plain)
    recomputed = {name for name, _ in model.named_buffers()} - wanted
    keys = [key for key in state if key not in recomputed]
    check_keys(wanted, set(keys), f"{place} does not fit {type(model).__name__}")
    if not is_stored:
        for layer in layers.values():
            layer.make_room()
    wide = getattr(model, "_keep_in_fp32_modules", None) or ()
    pour(model, Renamed(state, {key: key for key in keys}), dtype=dtype, place=place, wide=wide)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if left := [name for name, tensor in tensors if tensor.is_meta]:
        raise CheckpointError(f"{place} left {some(left)} of {type(model).__name__} without weights.")


def pour(
    model: nn.Module, state: Mapping[str, Tensor], *, dtype: torch.dtype, place: str, wide: Collection[str] = ()
) -> None:
    """The tensors of a state dict into a network that is prepared for them, one after the other.

    `wide`: parts of names whose layers overflow in float16, as some of T5 do: they are float32 there.
    """

    def precision(key: str) -> torch.dtype:
        return torch.float32 if dtype == torch.float16 and set(wide).intersection(key.split(".")) else dtype

    kind = quantizing().Quantized
    layers = {name: part for name, part in model.named_modules() if isinstance(part, kind)}
    for name, layer in layers.items():
        layer.like = torch.empty(0, dtype=precision(f"{name}.weight"))
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key in state:
        name, _, last = key.rpartition(".")
        tensor = state[key]
        own = layers[name].weight if name in layers and last == "weight" else wanted[key]
        if tensor.shape != own.shape:
            shapes = f"{key} is {tuple(tensor.shape)}, expected {tuple(own.shape)}"
            raise CheckpointError(f"{place} holds weights of another shape than its config.json says: {shapes}.")
        if name in layers and last != "bias":
            _take(layers[name], last, _checked(tensor, key, None if last == "weight" else own.dtype, place))
        elif isinstance(own, nn.Parameter) and own.is_floating_point():
            _assign(model, key, cast(_checked(tensor, key, None, place), precision(key)))
        else:
            _assign(model, key, cast(tensor, own.dtype))


def refuse_packed(state: Mapping[str, Tensor], place: str) -> None:
    """Weights that somebody else has quantized, before any is read."""
    lying: Mapping[str, Any] = state.lying if isinstance(state, LazyState) else state
    codes = {torch.int8, torch.uint8}
    if packed := {key for key, one in lying.items() if one.dtype in codes or key.endswith(".SCB")}:
        raise CheckpointError(
            f"{place} is quantized ({some(packed)}): load the plain or fp16 weights and quantize those."
        )


def check_keys(wanted: Collection[str], given: Collection[str], complaint: str) -> None:
    """A state dict must have all that a network wants, and nothing else."""
    problems = []
    if missing := set(wanted) - set(given):
        problems.append(f"missing: {some(missing)}")
    if unexpected := set(given) - set(wanted):
        problems.append(f"unexpected: {some(unexpected)}")
    if problems:
        raise CheckpointError(f"{complaint}; {'; '.join(problems)}. Are config.json and the weights of one network?")


def _checked(tensor: Tensor, key: str, stored: torch.dtype | None, place: str) -> Tensor:
    if stored is not None and tensor.dtype != stored:
        raise CheckpointError(f"{place}: {key} is stored as {tensor.dtype}, expected {stored}.")
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
