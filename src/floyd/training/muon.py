"""Muon: the momentum of a matrix, made orthogonal, as its update.

K. Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks"; at the scale of AdamW's updates
(Moonlight, arXiv:2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from floyd.runtime.machine import computes_in

# A quintic whose iteration drives all singular values towards 1 quickly, if not exactly.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_ADAM_RMS = 0.2  # of an update, so that AdamW's learning rates serve


def orthogonalized(matrix_MN: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, by Newton-Schulz iteration, in bfloat16 where that is fast."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    dtype = torch.bfloat16 if computes_in(torch.bfloat16, matrix_MN.device) else torch.float32
    x = (matrix_MN.T if is_tall else matrix_MN).to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix_MN.dtype)


class Muon(torch.optim.Optimizer):
    """For matrices and convolution kernels, the latter as [out, in * height * width]."""

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                mean = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(mean, group["momentum"]).flatten(1)
                update = orthogonalized(ahead) * (_ADAM_RMS * max(ahead.shape) ** 0.5)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"])
        return loss
