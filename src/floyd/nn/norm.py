"""GroupNorm with what follows it, in one place, so that something faster can be put there.

B images  C channels  H height  W width
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from floyd.nn.rewrites import Elementwise, elementwise


class AtOnce(Protocol):
    """Computes what `normed` does, in fewer passes; None where it cannot."""

    def __call__(
        self, norm: nn.GroupNorm, x_BCHW: Tensor, act: Elementwise | None, film: tuple[Tensor, Tensor] | None
    ) -> Tensor | None: ...


def normed(
    norm: nn.GroupNorm, x_BCHW: Tensor, act: Elementwise | None = None, film: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The norm, scaled by 1 + scale_BC and shifted by shift_BC (FiLM, arXiv:1709.07871), activated."""
    at_once: AtOnce | None = vars(norm).get("at_once")
    if at_once is not None and (out_BCHW := at_once(norm, x_BCHW, act, film)) is not None:
        return out_BCHW
    x_BCHW = norm(x_BCHW)
    if film is not None:
        scale_BC, shift_BC = film
        x_BCHW = x_BCHW * (1 + scale_BC[:, :, None, None]) + shift_BC[:, :, None, None]
    return x_BCHW if act is None else elementwise(act, x_BCHW)


def norms_of(model: nn.Module) -> list[nn.GroupNorm]:
    """Those that are computed by `normed`."""
    return [module for module in model.modules() if type(module) is nn.GroupNorm]


def compute_at_once(norm: nn.GroupNorm, by: AtOnce) -> None:
    vars(norm)["at_once"] = by
