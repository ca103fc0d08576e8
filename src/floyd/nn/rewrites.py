"""The same arithmetic, written so that it runs faster; for sampling, where nothing is learned.

Rewritten weights are copies. They belong to the weights as they were when the copies were made, so whoever samples
makes them anew for every picture, and nothing that is saved, trained or adapted ever holds them. What is not plainly
the layer that a rewrite knows, because it is adapted, quantized or hooked, computes as it always does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rewrites(Protocol):
    """What may be rewritten; each is exact up to rounding."""

    @property
    def fold_scale_shift(self) -> bool:
        """Time's scale and shift become the affine part of the norm before them."""

    @property
    def fuse_qkv(self) -> bool:
        """Queries, keys and values of the pixels come from one matrix product."""

    @property
    def rewrite_upsampling(self) -> bool:
        """Doubling and then convolving is one transposed convolution, with 4/9 of the products."""

    @property
    def channels_last(self) -> bool:
        """Feature maps lie in memory pixel by pixel."""

    @property
    def pack_convolutions(self) -> bool:
        """Weights of convolutions lie as the CPU's kernels want them, and not only once a kernel has begun."""


def is_exactly(module: object, kind: type[nn.Module]) -> bool:
    """Whether a module is the layer itself with plain weights, and nothing built upon it or put into its place."""
    if type(module) is not kind or is_watched(module):
        return False
    parts = (module.weight, module.bias)  # a quantized weight may be a tensor of another kind in an ordinary layer
    return all(part is None or type(part) in (Tensor, nn.Parameter) for part in parts) and module.weight is not None


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to know when a module computes, or does it in its stead."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in hooks) or "forward" in vars(module)


def version_of(tensor: Tensor) -> int:
    """Counts the changes of a tensor's numbers; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


class Joined(NamedTuple):
    """Several linear layers of one input as one."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layers: list[Any]) -> Joined | None:
        """None where a layer is not a plain one, or they do not match."""
        if not all(is_exactly(layer, nn.Linear) for layer in layers):
            return None
        biases = [layer.bias for layer in layers]
        if len({bias is None for bias in biases}) > 1 or len({layer.weight.dtype for layer in layers}) > 1:
            return None
        bias = None if biases[0] is None else torch.cat(biases).detach()
        return cls(torch.cat([layer.weight for layer in layers]).detach(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


Elementwise = Callable[[Tensor], Tensor]


def elementwise(function: Elementwise, x_BCHW: Tensor) -> Tensor:
    """A function of each number alone. On the CPU the kernels (GELU's above all: 3.5 times) like contiguous memory."""
    if x_BCHW.is_contiguous() or not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        return function(x_BCHW)
    return function(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
