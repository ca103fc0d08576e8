"""Training on the CPU by kernels of our own: a norm with its scale, shift and activation in two passes each way.

torch computes them one after the other, and GroupNorm back through feature maps that lie pixel by pixel (in which its
convolutions are fastest) some ten times slower than it need be in bfloat16.

B images  C channels  G groups  D channels of a group  H height  W width  P pixels (H*W)
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from floyd.engines.maps import Maps
from floyd.engines.native import kernels
from floyd.errors import EngineError
from floyd.nn.norm import compute_at_once, norms_of
from floyd.nn.rewrites import Elementwise, is_watched

log = logging.getLogger(__name__)


def quicken(model: nn.Module) -> bool:
    """Let a model that is to be trained on the CPU lie pixel by pixel and be normed by the kernels.

    False, and nothing changed, where it has none or the kernels cannot be compiled, which the log says.
    """
    if not (norms := norms_of(model)):
        return False
    try:
        at_once = _AtOnce(Maps(kernels()))
    except EngineError as error:
        log.warning("Training goes on without kernels of its own, which take a sixth or more off a step. %s", error)
        return False
    for norm in norms:
        compute_at_once(norm, at_once)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which torch's own types leave out
    return True


class _AtOnce:
    """See `floyd.nn.norm.AtOnce`."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps

    def __deepcopy__(self, memo: dict[int, Any]) -> _AtOnce:
        return self

    def __call__(
        self, norm: nn.GroupNorm, x_BCHW: Tensor, act: Elementwise | None, film: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        name = _act_name(act)
        if name is None or not _fits(norm, x_BCHW, self.maps.lanes):
            return None
        weight_BC, bias_BC = (part.float().expand(len(x_BCHW), -1) for part in (norm.weight, norm.bias))
        if film is not None:
            scale_BC, shift_BC = (part.float() for part in film)
            weight_BC, bias_BC = weight_BC * (1 + scale_BC), bias_BC * (1 + scale_BC) + shift_BC
        out_BCHW: Tensor = _Normed.apply(x_BCHW, weight_BC, bias_BC, norm.num_groups, norm.eps, name, self.maps)
        return out_BCHW


class _Normed(torch.autograd.Function):
    """act(GroupNorm(x) weight + bias), weight and bias [B, C] in float32."""

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_BC: Tensor, bias_BC: Tensor, groups: int, eps: float, act: str, maps: Maps
    ) -> Tensor:
        first_BC = x_BCHW[:, :, 0, 0].double()
        sum_BC, square_BC = maps.sums(x_BCHW).unbind(1)
        pixels = x_BCHW[0, 0].numel()
        square_BC = square_BC + first_BC * (2 * sum_BC + first_BC * pixels)
        sum_BC = sum_BC + first_BC * pixels
        count = x_BCHW[0].numel() // groups
        mean_BG1, square_BG1 = (_over_groups(part, groups) / count for part in (sum_BC, square_BC))
        root_BG1 = ((square_BG1 - mean_BG1.square()).clamp_min(0) + eps).rsqrt()
        scale_BC = _by_group(root_BG1, weight_BC)
        shift_BC = bias_BC - _by_group(mean_BG1, scale_BC)
        ctx.save_for_backward(x_BCHW, weight_BC, scale_BC, shift_BC, mean_BG1, root_BG1)
        ctx.told = (act, maps)
        return maps.mapped(x_BCHW, scale_BC, shift_BC, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        """With n = (x - mean) root: dx = root (g w - mean(g w) - n mean(g w n)), means over a group; g before act."""
        x_BCHW, weight_BC, scale_BC, shift_BC, mean_BG1, root_BG1 = ctx.saved_tensors
        act, maps = ctx.told
        groups, count = mean_BG1.shape[1], x_BCHW[0].numel() // mean_BG1.shape[1]
        middle_BC = _by_group(mean_BG1, torch.ones_like(weight_BC))
        grad_BCHW = grad_BCHW.to(x_BCHW.dtype).contiguous(memory_format=torch.channels_last)
        out_BCHW, sums_B2C = maps.back_to_norm(grad_BCHW, x_BCHW, scale_BC, shift_BC, middle_BC, act)
        bias_BC, product_BC = sums_B2C.unbind(1)
        dweight_BC = _by_group(root_BG1, product_BC)
        if ctx.needs_input_grad[0]:
            mean_g_BG1 = _over_groups(bias_BC * weight_BC, groups) / count
            mean_gn_BG1 = _over_groups(dweight_BC * weight_BC, groups) / count
            slope_BG1 = -root_BG1.square() * mean_gn_BG1
            ones_BC = torch.ones_like(weight_BC)
            x_by_BC = _by_group(slope_BG1, ones_BC)
            rest_BC = _by_group(-root_BG1 * mean_g_BG1 - slope_BG1 * mean_BG1, ones_BC)
            maps.mix(out_BCHW, x_BCHW, scale_BC, x_by_BC, rest_BC)
        return out_BCHW, dweight_BC.float(), bias_BC.float(), None, None, None, None


def _over_groups(x_BC: Tensor, groups: int) -> Tensor:
    """[B, G, 1], the sums over the channels of each group."""
    return x_BC.unflatten(1, (groups, -1)).sum(-1, keepdim=True)


def _by_group(factor_BG1: Tensor, x_BC: Tensor) -> Tensor:
    """x times its group's factor, as x is."""
    return (x_BC.unflatten(1, (factor_BG1.shape[1], -1)) * factor_BG1).flatten(1).to(x_BC.dtype)


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
