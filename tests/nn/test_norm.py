from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.nn.norm import compute_at_once, normed, norms_of
from floyd.nn.rewrites import Elementwise


def norm_and_map() -> tuple[nn.GroupNorm, Tensor]:
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, torch.randn(3, 6, 5, 4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_norm_then_film_then_the_activation(memory_format: torch.memory_format) -> None:
    norm, x_BCHW = norm_and_map()
    scale_BC, shift_BC = torch.randn(2, 3, 6)
    film_BCHW = norm(x_BCHW) * (1 + scale_BC[:, :, None, None]) + shift_BC[:, :, None, None]
    own_BCHW = x_BCHW.contiguous(memory_format=memory_format)
    torch.testing.assert_close(normed(norm, own_BCHW), norm(x_BCHW))
    torch.testing.assert_close(normed(norm, own_BCHW, nn.SiLU()), F.silu(norm(x_BCHW)))
    torch.testing.assert_close(normed(norm, own_BCHW, film=(scale_BC, shift_BC)), film_BCHW)
    torch.testing.assert_close(normed(norm, own_BCHW, F.gelu, (scale_BC, shift_BC)), F.gelu(film_BCHW))


def test_what_was_put_in_its_place_computes_it_or_says_that_it_cannot() -> None:
    norm, x_BCHW = norm_and_map()
    asked: list[Elementwise | None] = []

    def by(
        norm: nn.GroupNorm, x_BCHW: Tensor, act: Elementwise | None, film: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        asked.append(act)
        return torch.zeros(()) if act is F.gelu else None

    compute_at_once(norm, by)
    assert normed(norm, x_BCHW, F.gelu).ndim == 0
    torch.testing.assert_close(normed(norm, x_BCHW, F.silu), F.silu(norm(x_BCHW)))
    assert asked == [F.gelu, F.silu]


def test_only_group_norms_themselves_are_found() -> None:
    class Other(nn.GroupNorm):
        pass

    norm = nn.GroupNorm(2, 6)
    assert norms_of(nn.Sequential(norm, nn.LayerNorm(6), Other(2, 6))) == [norm]
