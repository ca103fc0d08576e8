"""Feature maps that lie pixel by pixel, in float32 or bfloat16, and what the kernels do to each of their numbers.

B images  C channels  H height  W width
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from floyd.engines.native import ACTS, Kernels


class Map(ctypes.Structure):
    """A feature map: kernels/learn.h, field by field."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("is_half", "images", "pixels", "channels"))


class Maps:
    """kernels/learn.h, told in tensors: maps are [B, C, H, W], channels_last; what is [B, C] is float32."""

    def __init__(self, kernels: Kernels) -> None:
        self.lanes = kernels.lanes  # channels are a multiple of this
        self._library = kernels.library

    def sums(self, x_BCHW: Tensor) -> Tensor:
        """[B, 2, C] in float64, over the pixels: of x - its first pixel, and of the square of that."""
        sums_B2C = _sums_for(x_BCHW)
        self._call("sums", x_BCHW, x_BCHW, sums_B2C)
        return sums_B2C

    def mapped(self, x_BCHW: Tensor, scale_BC: Tensor, shift_BC: Tensor, act: str) -> Tensor:
        """act(x scale + shift)."""
        out_BCHW = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
        self._call("map", x_BCHW, x_BCHW, scale_BC, shift_BC, ACTS.index(act), out_BCHW)
        return out_BCHW

    def back_to_norm(
        self, grad_BCHW: Tensor, x_BCHW: Tensor, scale_BC: Tensor, shift_BC: Tensor, middle_BC: Tensor, act: str
    ) -> tuple[Tensor, Tensor]:
        """d = grad act'(x scale + shift); and [B, 2, C] in float64, over the pixels: sums of d and d (x - middle)."""
        out_BCHW, sums_B2C = torch.empty_like(x_BCHW, memory_format=torch.channels_last), _sums_for(x_BCHW)
        self._call(
            "back_to_norm",
            x_BCHW,
            grad_BCHW,
            x_BCHW,
            scale_BC,
            shift_BC,
            middle_BC,
            ACTS.index(act),
            out_BCHW,
            sums_B2C,
        )
        return out_BCHW, sums_B2C

    def mix(self, out_BCHW: Tensor, x_BCHW: Tensor, a_BC: Tensor, b_BC: Tensor, c_BC: Tensor) -> None:
        """out = out a + x b + c, in place."""
        self._call("mix", x_BCHW, out_BCHW, x_BCHW, a_BC, b_BC, c_BC)

    def _call(self, name: str, like_BCHW: Tensor, *told: Tensor | int) -> None:
        images, channels, height, width = like_BCHW.shape
        own = Map(like_BCHW.dtype == torch.bfloat16, images, height * width, channels)
        kept = [part.contiguous() if isinstance(part, Tensor) and part.ndim < 4 else part for part in told]
        arguments = [
            ctypes.c_void_p(part.data_ptr()) if isinstance(part, Tensor) else ctypes.c_int64(part) for part in kept
        ]
        getattr(self._library, f"floyd_{name}")(ctypes.byref(own), *arguments, ctypes.c_int32(torch.get_num_threads()))


def _sums_for(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.new_empty(x_BCHW.shape[0], 2, x_BCHW.shape[1], dtype=torch.float64)
