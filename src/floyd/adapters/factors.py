"""The two small matrices of each layer, sorted out of a file and held against the network that they are for.

Nothing is touched here: what comes out fits, or an error says what does not.

R rank  I inputs  O outputs
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from floyd.adapters.keys import COMPONENTS, Key, Role, layer_of, looks_like, read_key
from floyd.errors import CheckpointError
from floyd.store.weights import some

_GUESSES = 3


class Shape(NamedTuple):
    """What a layer takes and gives."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()  # of a convolution

    def __str__(self) -> str:
        kernel = f", kernel {'x'.join(map(str, self.kernel))}" if self.kernel else ""
        return f"{self.inputs} inputs and {self.outputs} outputs{kernel}"


@dataclass(frozen=True, eq=False)
class Factors:
    """A layer's weight becomes W + alpha / rank * up @ down (arXiv:2106.09685)."""

    down: Tensor  # [R, I] or [R, I, h, w]
    up: Tensor  # [O, R] or [O, R, 1, 1]
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def baked(self) -> Factors:
        """The same change with alpha equal to the rank, so that nobody needs to be told it."""
        if self.alpha == self.rank:
            return self
        return Factors(self.down, (self.up.float() * self.scale).to(self.up.dtype), float(self.rank))


@dataclass(frozen=True)
class LoraFile:
    """A state dict, and what was said beside it."""

    state: Mapping[str, Any]
    name: str = "the state dict"  # for complaints
    configs: Mapping[str | None, Mapping[str, Any]] = field(default_factory=dict)  # peft's, by component

    def __post_init__(self) -> None:
        for component, config in self.configs.items():
            if config.get("use_dora") or config.get("peft_type", "LORA") not in ("LORA", None):
                kind = "DoRA" if config.get("use_dora") else config["peft_type"]
                raise CheckpointError(f"{self.name} is {kind} for {component or 'a network'}; floyd loads plain LoRA.")

    def alpha(self, component: str, path: str, rank: int) -> float:
        """As told beside the tensors; the rank where nothing is told."""
        config = self.configs.get(component, self.configs.get(None, {}))
        alpha = config.get("lora_alpha")
        for pattern, special in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = special
                break
        if alpha is None:
            return float(rank)
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def sorted_out(file: LoraFile, networks: Mapping[str, nn.Module | None]) -> dict[str, dict[str, Factors]]:
    """By component and layer. A network that is None is not there; what the file holds for it is left out.

    CheckpointError for a key that nothing here uses, a factor without its partner, a shape that does not fit.
    """
    shapes = {name: dict(layer_shapes(net)) for name, net in networks.items() if net is not None}
    absent = {name for name, network in networks.items() if network is None}
    parts: dict[tuple[str, str], dict[Role, Tensor]] = {}
    problems = _Problems()
    for name, tensor in file.state.items():
        key = read_key(name)
        if key is not None and key.component in absent:
            continue
        found = None if key is None else _find(key, shapes)
        if key is None or found is None:
            is_told = len(problems.unused) < _GUESSES  # looking for near names takes time
            problems.unused[name] = looks_like(name, [n for own in shapes.values() for n in own]) if is_told else ""
        elif complaint := _unfit(key.role, tensor):
            problems.broken.append(f"{name} {complaint}")
        elif key.role in parts.setdefault(found, {}):
            problems.broken.append(f"{name} is the second {key.role} factor of {'.'.join(found)}")
        else:
            parts[found][key.role] = tensor
    problems.raise_if_any(file.name)
    out: dict[str, dict[str, Factors]] = {}
    for (component, path), roles in parts.items():
        fitted = _fitted(file, component, path, roles, shapes[component][path], problems)
        if fitted is not None:
            out.setdefault(component, {})[path] = fitted
    problems.raise_if_any(file.name)
    return out


def layer_shapes(network: nn.Module) -> Iterator[tuple[str, Shape]]:
    """Every layer that LoRA can act on, by name; through LoRA that is there already."""
    inside: list[str] = []
    for name, layer in network.named_modules():
        if any(name.startswith(start) for start in inside[-1:]):
            continue
        if hasattr(layer, "base_layer"):
            inside.append(f"{name}.")
            layer = innermost(layer)
        if (shape := shape_of(layer)) is not None:
            yield name, shape


def innermost(layer: Any) -> Any:
    """The layer itself, without the LoRA around it."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's weight is an ordinary tensor of floats, which peft knows and LoRA can be added to."""
    weight: Any = getattr(layer, "weight", None)
    is_known = isinstance(layer, nn.Linear | nn.Conv2d) and type(weight) in (Tensor, nn.Parameter)
    return is_known and bool(weight.is_floating_point())


def shape_of(layer: nn.Module) -> Shape | None:
    """None for what LoRA cannot act on. Quantized layers are known by what they say of themselves."""
    if isinstance(layer, nn.Conv2d):
        kernel = (int(layer.kernel_size[0]), int(layer.kernel_size[1]))
        return Shape(layer.in_channels, layer.out_channels, kernel) if layer.groups == 1 else None
    inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return Shape(inputs, outputs)
    weight = getattr(layer, "weight", None)
    is_leaf = next(layer.children(), None) is None
    if is_leaf and isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(layer, nn.Embedding):
        return Shape(weight.shape[1], weight.shape[0])
    return None


def read_layers(layers: Any, name: str) -> dict[str, Factors]:
    """A component's LoRA as a trainer hands it over: a module or a state dict, in any format, without a network."""
    state = layers.state_dict() if isinstance(layers, nn.Module) else layers
    if not isinstance(state, Mapping):
        raise TypeError(f"{name} must be a state dict or a module, got a {type(layers).__name__}.")
    parts: dict[str, dict[Role, Tensor]] = {}
    for key_name, tensor in state.items():
        key = read_key(key_name)
        if key is None or key.is_flat or not isinstance(tensor, Tensor):
            guess = looks_like(key_name)
            raise ValueError(f"{name}: {key_name} is no factor of LoRA{guess and ': '}{guess}.")
        path = key.path if not key.path.endswith("to_out") else f"{key.path}.0"
        parts.setdefault(path, {})[key.role] = tensor
    for path, roles in parts.items():
        if not {"down", "up"} <= roles.keys():
            raise ValueError(f"{name}: {path} has its {' and '.join(roles)} alone; LoRA is a down and an up factor.")
    return {
        path: Factors(roles["down"], roles["up"], float(roles.get("alpha", len(roles["down"]))))
        for path, roles in parts.items()
    }


@dataclass
class _Problems:
    """All that is wrong with a file, to be told at once."""

    unused: dict[str, str] = field(default_factory=dict)  # key -> a guess at what it is
    broken: list[str] = field(default_factory=list)

    def raise_if_any(self, name: str) -> None:
        said = []
        if self.unused:
            guesses = list(dict.fromkeys(guess for guess in self.unused.values() if guess))
            hint = f" ({'; '.join(guesses[:2])})" if guesses else ""
            said.append(f"nothing here uses {some(list(self.unused))}{hint}")
        if self.broken:
            said.append("; ".join(self.broken[:3]) + (f"; and {len(self.broken) - 3} more" * (len(self.broken) > 3)))
        if said:
            raise CheckpointError(f"{name} cannot be loaded, and nothing of it was: {'; '.join(said)}.")


def _find(key: Key, shapes: Mapping[str, Mapping[str, Shape]]) -> tuple[str, str] | None:
    components = (key.component,) if key.component else COMPONENTS
    for component in components:
        if (path := layer_of(key, shapes.get(component, {}))) is not None:
            return component, path
    return None


def _fitted(
    file: LoraFile, component: str, path: str, roles: Mapping[Role, Tensor], shape: Shape, problems: _Problems
) -> Factors | None:
    """The factors as the layer needs them, or a problem more."""
    where = f"{component}.{path}"
    if not {"down", "up"} <= roles.keys():
        problems.broken.append(f"{where} has its {' and '.join(roles)} alone; LoRA is a down and an up factor")
        return None
    down, up = _as_layer(roles["down"], shape.kernel), _as_layer(roles["up"], (1, 1) if shape.kernel else ())
    rank = down.shape[0]
    wanted = ((rank, shape.inputs, *shape.kernel), (shape.outputs, rank, *((1, 1) if shape.kernel else ())))
    if rank == 0 or (tuple(down.shape), tuple(up.shape)) != wanted:
        problems.broken.append(_misfit(where, down, up, shape))
        return None
    alpha = float(roles["alpha"]) if "alpha" in roles else file.alpha(component, path, rank)
    return Factors(down, up, alpha)


def _misfit(where: str, down: Tensor, up: Tensor, shape: Shape) -> str:
    sizes = f"{tuple(down.shape)} and {tuple(up.shape)}"
    if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        return f"the factors of {where} are {sizes}, which do not have one rank"
    return f"the factors of {where} are {sizes}, but the layer has {shape}: they are for another stage or size of IF"


def _as_layer(factor: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """A 1x1 convolution may be stored as a matrix, and a matrix as a 1x1 convolution."""
    if not kernel and factor.ndim == 4 and factor.shape[2:] == (1, 1):
        return factor[:, :, 0, 0]
    if kernel == (1, 1) and factor.ndim == 2:
        return factor[:, :, None, None]
    return factor


def _unfit(role: Role, tensor: Any) -> str:
    """What is wrong with one tensor by itself; empty if nothing is."""
    if not isinstance(tensor, Tensor):
        return f"must be a tensor, got a {type(tensor).__name__}"
    if role == "alpha":
        return "" if tensor.numel() == 1 and bool(tensor.isfinite()) else "must be one finite number"
    if not tensor.is_floating_point():
        return f"must be a tensor of floats, got {tensor.dtype}: quantized LoRA is not loaded"
    return "" if bool(tensor.isfinite().all()) else "holds numbers that are not finite"
