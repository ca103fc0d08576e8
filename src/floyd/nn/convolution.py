"""Convolutions for sampling: their weights rewritten or laid out once, for many steps.

B images  C channels  H height  W width  I input channels  O output channels  A, B, U, V places in a kernel
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.nn.rewrites import Rewrites, is_exactly

Convolve = Callable[[Tensor], Tensor]

MOST_PACKED_BYTES = 4 << 30  # packed weights are held beside the others for as long as a picture is painted

# What a kernel of three taps [a, b, c] does to a signal whose every sample was repeated is what [a, a + b, b + c, c]
# does, transposed and with stride two, to the signal itself: tap u of four as a sum of the three, last first.
_TAPS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


class Convolutions:
    """Makes convolutions ready, as far as the memory for packed ones reaches."""

    def __init__(self, rewrites: Rewrites) -> None:
        self.rewrites = rewrites
        self.left_bytes = MOST_PACKED_BYTES

    def ready(self, conv: nn.Module | None) -> Any:
        """What computes what `conv` computes: mostly itself."""
        if not (isinstance(conv, nn.Conv2d) and self._packs(conv)):
            return conv
        return PackedConv(conv)

    def doubling(self, conv: nn.Module) -> Convolve:
        """Twice the height and width, then `conv`."""
        if not (self.rewrites.rewrite_upsampling and is_exactly(conv, nn.Conv2d) and _is_3x3(conv)):
            ready = self.ready(conv)
            return lambda x_BCHW: ready(doubled(x_BCHW))
        assert isinstance(conv, nn.Conv2d)
        return PackedDoubling(conv) if self._packs(conv) else Doubling(conv)

    def _packs(self, conv: nn.Module) -> bool:
        if not (self.rewrites.pack_convolutions and is_exactly(conv, nn.Conv2d)):
            return False
        assert isinstance(conv, nn.Conv2d)
        if conv.kernel_size == (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return False  # one tap is a matrix product, which needs no packing
        size = 2 * conv.weight.nbytes  # a doubling's are 16/9 as large
        if size > self.left_bytes or not can_pack(conv.weight):
            return False
        self.left_bytes -= size
        return True


class PackedConv:
    """A convolution whose weights lie in oneDNN's own order, in which an ordinary one puts them at every call.

    Which order that is depends on the size of the picture: they are laid out for the first, and anew for another.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self.weight, self.bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        self.places = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.laid_out: tuple[list[int], Tensor | None] = ([], None)

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        size, weight = list(x_BCHW.shape), self.laid_out[1]
        if self.laid_out[0] != size:
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.places, size)
            self.laid_out = (size, weight)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x_BCHW, weight, self.bias, *self.places, "none", [], "")
        return out


class Doubling:
    """Nearest-neighbour doubling and a 3x3 convolution, as one transposed convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.weight = transposed_kernel(conv.weight.detach())

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        return F.conv_transpose2d(x_BCHW, self.weight, self.bias, stride=2, padding=1)


class PackedDoubling:
    """The same with packed weights."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.weight, self.bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        self.places = ((1, 1), (0, 0), (2, 2), (1, 1), 1)  # padding, that of the output, stride, dilation, groups
        self.laid_out: tuple[list[int], Tensor | None] = ([], None)

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        size, weight = list(x_BCHW.shape), self.laid_out[1]
        if self.laid_out[0] != size:
            kernel = transposed_kernel(self.weight)
            weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(kernel, *self.places, size)
            self.laid_out = (size, weight)
        out: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise(
            x_BCHW, weight, self.bias, *self.places, "none", [], ""
        )
        return out


def doubled(x_BCHW: Tensor) -> Tensor:
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


def transposed_kernel(weight_OIAB: Tensor) -> Tensor:
    """[I, O, 4, 4] of a 3x3 kernel [O, I, 3, 3]; summed in float32 at the least."""
    exact = weight_OIAB.to(torch.promote_types(weight_OIAB.dtype, torch.float32))
    taps_UA = torch.tensor(_TAPS, dtype=exact.dtype, device=exact.device)
    return torch.einsum("ua,oiab,vb->iouv", taps_UA, exact, taps_UA).to(weight_OIAB.dtype).contiguous()


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has kernels for such weights on this machine, and this torch gives access to them."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    ops = torch.ops.mkldnn
    names = ("_reorder_convolution_weight", "_convolution_pointwise", "_reorder_convolution_transpose_weight")
    if not all(hasattr(ops, name) for name in (*names, "_convolution_transpose_pointwise")):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _is_3x3(conv: nn.Module) -> bool:
    plain = {"kernel_size": (3, 3), "padding": (1, 1), "stride": (1, 1), "dilation": (1, 1), "groups": 1}
    return all(getattr(conv, name) == value for name, value in plain.items()) and conv.padding_mode == "zeros"
