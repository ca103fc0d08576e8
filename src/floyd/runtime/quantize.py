"""Weights in fewer bits: layers that keep them so and unpack them as they are used.

Only the weights of linear and convolutional layers are kept so; what is computed, is computed in the network's own
precision. A quantized network is moved and cast like any other: its codes and scales travel, and keep their bits.

B batch  I, O features
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.errors import ConfigError
from floyd.runtime.schemes import SCHEMES, Kept, Scheme, scheme_named

M = TypeVar("M", bound=nn.Module)

STORED = ("codes", "scale")  # of a quantized layer in a state dict, where others have `weight`
METHOD = "floyd"  # `quant_method` in a configuration file
VERSION = 2

# Parts of keys. First and last layers carry what no later layer repairs, and weigh nothing; nor do the 1x1 convolutions
# that all a residual block was given goes through: they are 3 % of a UNet and made half of the error.
_PRECISE = frozenset(
    "conv_in conv_out conv_shortcut time_embedding class_embedding quant_conv post_quant_conv p_head w_head "
    "patch_embedding".split()
)
_TABLES = frozenset("shared embed_tokens relative_attention_bias token_embedding position_embedding".split())


@dataclass(frozen=True)
class StoredWeight:
    """What a quantized layer has for a `weight`: no tensor, lest someone reads the codes as one.

    transformers' T5 casts the input of its `wo` to the dtype of a weight that is a tensor: codes would destroy it.
    """

    layer: Quantized
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def dequantized(self) -> Tensor:
        return self.layer.dequantized()


class Quantized(nn.Module):
    """A layer whose weight is `codes` and `scale`; what stands for it is made anew at each use."""

    _wraps: ClassVar[type[nn.Module]]
    codes: Tensor
    scale: Tensor
    like: Tensor  # empty: follows the casts of the network, for it is told in which precision to compute
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, scheme: Scheme) -> None:
        """Of the same geometry as `layer`, whose bias it takes over; `take` or a state dict brings the weight."""
        super().__init__()
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, nn.Parameter)
        self.scheme = scheme
        self.shape = weight.shape
        for name, tensor in zip(STORED, self._room("meta"), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype, device=_real(weight.device)), persistent=False)
        self.bias = bias

    @torch.no_grad()
    def take(self, weight: Tensor) -> Self:
        """Keep this weight."""
        if weight.shape != self.shape:
            raise ValueError(f"This layer takes a weight of shape {tuple(self.shape)}, got {tuple(weight.shape)}.")
        if self.codes.is_meta or self.codes.device != weight.device:
            self.make_room(weight.device)
        self.scheme.keep(weight.detach(), Kept(self.codes, self.scale))
        return self

    def make_room(self, device: torch.device | str = "cpu") -> None:
        """Reserve the memory. Done for all layers before the first takes its weight, what the work needs for a moment
        leaves no gaps between what stays."""
        self.codes, self.scale = self._room(device)

    def _room(self, device: torch.device | str) -> Kept:
        return Kept.room(self.scheme.extents(tuple(self.shape)), device)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.scheme.weight(Kept(self.codes, self.scale), self.shape, dtype or self.like.dtype)

    @property
    def weight(self) -> StoredWeight:
        return StoredWeight(self, self.shape, self.like.dtype, self.codes.device)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.scheme.name}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves go through, casts change the precision of the computation alone: codes and scale pass as bytes."""
        kinds = {name: self._buffers[name].dtype for name in STORED}  # type: ignore[union-attr]
        for name in STORED:
            self._buffers[name] = self._buffers[name].view(torch.uint8)  # type: ignore[union-attr]
        try:
            super()._apply(fn, recurse)
        finally:
            for name, kind in kinds.items():
                self._buffers[name] = self._buffers[name].view(kind)  # type: ignore[union-attr]
        return self


class QuantizedLinear(Quantized):
    _wraps = nn.Linear

    def __init__(self, layer: nn.Linear, scheme: Scheme) -> None:
        super().__init__(layer, scheme)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x_BI: Tensor) -> Tensor:
        dtype = self.like.dtype
        x_BI = x_BI.to(dtype)
        if not self.scheme.by_channel or dtype == torch.float16:  # codes are large: their sums overflow in float16
            return F.linear(x_BI, self.dequantized(), self.bias)
        y_BO = F.linear(x_BI, self.codes.to(dtype)) * self.scale  # the codes are exact in bfloat16, too
        return (y_BO if self.bias is None else y_BO + self.bias).to(dtype)


class QuantizedConv2d(Quantized):
    _wraps = nn.Conv2d

    def __init__(self, layer: nn.Conv2d, scheme: Scheme) -> None:
        super().__init__(layer, scheme)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.groups = layer.kernel_size, layer.stride, layer.groups
        self.padding, self.dilation, self.padding_mode = layer.padding, layer.dilation, layer.padding_mode

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW, weight = x_BCHW.to(self.like.dtype), self.dequantized()
        return F.conv2d(x_BCHW, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


_LAYERS: tuple[type[Quantized], ...] = (QuantizedLinear, QuantizedConv2d)


# ------------------------------------------------------------------------------------------------------ whole networks


def prepare(model: nn.Module, quantization: str) -> dict[str, Quantized]:
    """Put quantized layers, still without weights, in the place of those that can be; by name.

    The network may lie on the meta device. Weights are brought one by one: `layers[name].take(weight)`.
    """
    scheme = scheme_named(quantization)
    if is_quantized(model):
        raise ValueError(f"This {type(model).__name__} is quantized already, as {quantization_of(model) or 'another'}.")
    layers = {name: kind(module, scheme) for name, module, kind in _candidates(model)}
    if not layers:
        raise ValueError(f"A {type(model).__name__} has no linear or convolutional layer to quantize: leave it out.")
    for name, layer in layers.items():
        layer.train(model.training)
        model.set_submodule(name, layer)
    return layers


@torch.no_grad()
def quantize(model: M, quantization: str) -> M:
    """A loaded network in fewer bits, in place, layer by layer. To load it so is to need less memory."""
    weights = {name: module.weight for name, module, _ in _candidates(model)}
    for name, layer in prepare(model, quantization).items():
        weight = weights.pop(name)
        assert isinstance(weight, Tensor)
        layer.take(weight)
    return model


def is_quantized(model: object) -> bool:
    """Whether any layer is one of ours, or the network says so of itself, as bitsandbytes' do."""
    return bool(getattr(model, "is_quantized", False)) or quantization_of(model) is not None


def quantization_of(model: object) -> str | None:
    """The name of the scheme in which floyd keeps the network's weights."""
    if not isinstance(model, nn.Module):
        return None
    return next((part.scheme.name for part in model.modules() if isinstance(part, Quantized)), None)


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module, type[Quantized]]]:
    return [
        (name, module, kind)
        for name, module in model.named_modules()
        for kind in _LAYERS
        if type(module) is kind._wraps
        and name
        and getattr(module, "padding_mode", "zeros") == "zeros"
        and is_quantizable(f"{name}.weight", module.weight.shape)  # type: ignore[arg-type]
    ]


# ------------------------------------------------------------------------------------------------ configuration, sizes


def config_of(quantization: str) -> dict[str, Any]:
    """What `quantization_config` of a component's config.json says."""
    scheme = scheme_named(quantization)
    own = {} if scheme.group_size is None else {"group_size": scheme.group_size}
    return {"quant_method": METHOD, "version": VERSION, "weights": scheme.name, **own}


def named_in(config: Mapping[str, Any]) -> str | None:
    """The scheme that a component's configuration says its files are kept in; None where it speaks of none."""
    told = config.get("quantization_config")
    if told is None:
        return None
    if not isinstance(told, Mapping) or told.get("quant_method") != METHOD:
        method = told.get("quant_method") if isinstance(told, Mapping) else told
        raise ConfigError(
            f"The weights are quantized by {method!r}, which floyd does not read: load the plain or fp16 weights, and "
            f"quantize them with quantization=, one of {', '.join(SCHEMES)}."
        )
    name = str(told.get("weights"))
    if name not in SCHEMES or dict(told) != config_of(name):
        raise ConfigError(
            f"This floyd cannot read weights quantized as {dict(told)}: another one wrote them. Quantize the plain "
            "weights again."
        )
    return name


def is_quantizable(key: str, shape: Sequence[int]) -> bool:
    """Whether the weight of this name, as state dicts have it, is one that is kept in fewer bits."""
    *path, last = key.split(".")
    if last != "weight" or len(shape) not in (2, 4) or not path:
        return False
    return not (_PRECISE | _TABLES).intersection(path)


def bytes_of(shape: Sequence[int], dtype: torch.dtype, quantization: str | None, key: str | None = None) -> int:
    """What a weight of this shape takes in memory, from a file's header alone.

    `quantization` applies to weights of two or four axes, and where the `key` is told, to those alone of linear and
    convolutional layers within the network. The others take `dtype`.
    """
    is_kept = len(shape) in (2, 4) if key is None else is_quantizable(key, shape)
    if quantization is None or not is_kept:
        return prod(shape) * dtype.itemsize
    return sum(extent.nbytes for extent in scheme_named(quantization).extents(tuple(shape)))


def bytes_of_all(
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    quantization: str | None = None,
    *,
    in_float32: Collection[str] = (),
) -> int:
    """The same of a whole state dict. `in_float32`: parts of names that stay so under float16 unless quantized, as
    `wo` of a T5 does."""
    total = 0
    for key, shape in shapes.items():
        is_wide = dtype == torch.float16 and bool(set(in_float32).intersection(key.split(".")))
        total += bytes_of(shape, torch.float32 if is_wide else dtype, quantization, key)
    return total


def nbytes(model: nn.Module) -> int:
    """What a network's weights take, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _real(device: torch.device) -> torch.device:
    """A network that is prepared without weights is filled on the CPU."""
    return torch.device("cpu") if device.type == "meta" else device
