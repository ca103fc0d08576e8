"""Training on the CPU by kernels of our own: a norm with its scale, shift and activation in two passes each way.

torch computes them one after the other, and GroupNorm back through feature maps that lie pixel by pixel (in which its
convolutions are fastest) some ten times slower than it need be in bfloat16.

B images  C channels  G groups  H height  W width
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from floyd.engines.native import ACTS, Kernels, kernels
from floyd.errors import EngineError
from floyd.nn.norm import compute_at_once, norms_of
from floyd.nn.rewrites import Elementwise, is_watched

log = logging.getLogger(__name__)

_NUMBERS = "is_half images pixels channels groups act film_stride".split()
_POINTERS = "x weight bias film_scale film_shift out scale shift mean root".split()


class Norm(ctypes.Structure):
    """What a norm reads and writes: kernels/learn.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("eps", ctypes.c_double),
    )


def quicken(model: nn.Module) -> bool:
    """Let a model that is to be trained on the CPU lie pixel by pixel and be normed by the kernels.

    False, and nothing changed, where it has none or the kernels cannot be compiled, which the log says.
    """
    if not (norms := norms_of(model)):
        return False
    try:
        at_once = _AtOnce(kernels())
    except EngineError as error:
        log.warning("Training goes on as torch does it, a fifth slower in bfloat16. %s", error)
        return False
    for norm in norms:
        compute_at_once(norm, at_once)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which torch's own types leave out
    return True


class _AtOnce:
    """See `floyd.nn.norm.AtOnce`."""

    def __init__(self, own: Kernels) -> None:
        self.own = own
        own.library.floyd_norm_bytes.restype = ctypes.c_int64
        assert own.library.floyd_norm_bytes() == ctypes.sizeof(Norm), "learn.h and learning.py differ"

    def __deepcopy__(self, memo: dict[int, Any]) -> _AtOnce:
        return self

    def __call__(
        self, norm: nn.GroupNorm, x_BCHW: Tensor, act: Elementwise | None, film: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        name = _act_name(act)
        if name is None or not _fits(norm, x_BCHW, self.own.lanes):
            return None
        weight_C, bias_C = norm.weight.float(), norm.bias.float()
        film_B2C = None if film is None else torch.stack(film, dim=1).float()
        told = (norm.num_groups, norm.eps, ACTS.index(name), self.own.library)
        out_BCHW: Tensor = _Normed.apply(x_BCHW, weight_C, bias_C, film_B2C, *told)
        return out_BCHW


class _Normed(torch.autograd.Function):
    """act(GroupNorm(x) weight + bias), weight and bias times 1 + film[:, 0], plus film[:, 1]; all but x in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BCHW: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        film_B2C: Tensor | None,
        groups: int,
        eps: float,
        act: int,
        library: ctypes.CDLL,
    ) -> Tensor:
        batch, channels = x_BCHW.shape[:2]
        out_BCHW = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
        affine_2BC, moments_2BG = weight_C.new_empty(2, batch, channels), weight_C.new_empty(2, batch, groups)
        ctx.told = (groups, eps, act, library)
        ctx.save_for_backward(x_BCHW, weight_C, bias_C, film_B2C, affine_2BC, moments_2BG)
        norm = _described(x_BCHW, weight_C, bias_C, film_B2C, affine_2BC, moments_2BG, groups, eps, act)
        norm.out = out_BCHW.data_ptr()
        library.floyd_norm_forth(ctypes.byref(norm), ctypes.c_int32(torch.get_num_threads()))
        return out_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_C, bias_C, film_B2C, affine_2BC, moments_2BG = ctx.saved_tensors
        groups, eps, act, library = ctx.told
        grad_BCHW = grad_BCHW.to(x_BCHW.dtype).contiguous(memory_format=torch.channels_last)
        dx_BCHW = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
        dweight_BC, dbias_BC = parts_2BC = weight_C.new_empty(2, *x_BCHW.shape[:2])
        norm = _described(x_BCHW, weight_C, bias_C, film_B2C, affine_2BC, moments_2BG, groups, eps, act)
        library.floyd_norm_back(
            ctypes.byref(norm),
            *(ctypes.c_void_p(part.data_ptr()) for part in (grad_BCHW, dx_BCHW, dweight_BC, dbias_BC)),
            ctypes.c_int32(torch.get_num_threads()),
        )
        dfilm_B2C = None
        if film_B2C is not None:
            if ctx.needs_input_grad[3]:
                dfilm_B2C = torch.stack([torch.addcmul(dbias_BC * bias_C, dweight_BC, weight_C), dbias_BC], dim=1)
            parts_2BC = parts_2BC * (1 + film_B2C[:, 0])
        dweight_C, dbias_C = parts_2BC.sum(1) if any(ctx.needs_input_grad[1:3]) else (None, None)
        return dx_BCHW, dweight_C, dbias_C, dfilm_B2C, None, None, None, None


def _described(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    film_B2C: Tensor | None,
    affine_2BC: Tensor,
    moments_2BG: Tensor,
    groups: int,
    eps: float,
    act: int,
) -> Norm:
    batch, channels, height, width = x_BCHW.shape
    norm = Norm(x_BCHW.dtype == torch.bfloat16, batch, height * width, channels, groups, act, 2 * channels, eps=eps)
    norm.x, norm.weight, norm.bias = x_BCHW.data_ptr(), weight_C.data_ptr(), bias_C.data_ptr()
    if film_B2C is not None:
        norm.film_scale, norm.film_shift = film_B2C.data_ptr(), film_B2C[0, 1].data_ptr()
    norm.scale, norm.shift = affine_2BC[0].data_ptr(), affine_2BC[1].data_ptr()
    norm.mean, norm.root = moments_2BG[0].data_ptr(), moments_2BG[1].data_ptr()
    return norm


def _act_name(act: Elementwise | None) -> str | None:
    """As the kernels call it; None: they do not know it."""
    if act is None:
        return "none"
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else None
    if isinstance(act, nn.SiLU) or act is F.silu:
        return "silu"
    return "gelu" if act is F.gelu else None


def _fits(norm: nn.GroupNorm, x_BCHW: Tensor, lanes: int) -> bool:
    return (
        x_BCHW.device.type == "cpu"
        and x_BCHW.dtype in (torch.float32, torch.bfloat16)
        and x_BCHW.ndim == 4
        and x_BCHW.shape[1] % lanes == 0
        and x_BCHW.is_contiguous(memory_format=torch.channels_last)
        and norm.affine
        and not is_watched(norm)
    )
