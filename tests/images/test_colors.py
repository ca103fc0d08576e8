"""An enlarged picture takes its coarse colours from the small one, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from floyd.images.colors import with_colors_of


def rendered(height: int, width: int, *, batch: int = 2) -> Tensor:
    """A gradient with a square on it, in [-1, 1]."""
    ramp = torch.linspace(-0.8, 0.8, width).expand(batch, 3, height, width).clone()
    ramp[:, 1] = -0.5
    ramp[..., height // 4 : height // 2, width // 4 : width // 2] = 1.0
    return ramp


def drift(height: int, width: int) -> Tensor:
    """What a network does to large areas."""
    rows, columns = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 4, width)[None]
    return 0.2 * torch.sin(rows) * torch.cos(columns) + 0.1


@pytest.mark.parametrize(("small", "factor"), [((32, 32), 4), ((24, 40), 4), ((17, 23), 3)])
def test_drift_is_taken_back_and_edges_stay(small: tuple[int, int], factor: int) -> None:
    size = (small[0] * factor, small[1] * factor)
    true_BCHW = rendered(*size)
    small_BChw = F.adaptive_avg_pool2d(true_BCHW, small)
    drifted_BCHW = true_BCHW + drift(*size)
    fixed_BCHW = with_colors_of(small_BChw, drifted_BCHW)
    assert (fixed_BCHW - true_BCHW).abs().mean() < 0.2 * (drifted_BCHW - true_BCHW).abs().mean()
    edges = [picture.diff(dim=-1).abs().amax() for picture in (fixed_BCHW, true_BCHW)]
    assert edges[0] == pytest.approx(float(edges[1]), rel=0.02)


def test_what_agrees_is_left_as_it_is() -> None:
    x_BCHW = rendered(64, 96)
    fixed_BCHW = with_colors_of(F.adaptive_avg_pool2d(x_BCHW, (16, 24)), x_BCHW)
    torch.testing.assert_close(fixed_BCHW, x_BCHW, atol=1e-6, rtol=0)


def test_texture_that_the_small_picture_does_not_hold_stays() -> None:
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    texture_HW = ((rows + columns) % 2) * 0.4 - 0.2
    flat_BCHW = torch.full((1, 3, 64, 64), 0.3)
    fixed_BCHW = with_colors_of(flat_BCHW[..., ::4, ::4] + 0.2, flat_BCHW + texture_HW)
    torch.testing.assert_close(fixed_BCHW, flat_BCHW + 0.2 + texture_HW, atol=1e-6, rtol=0)


def test_grain_of_the_small_picture_is_not_taken_over() -> None:
    grain_BChw = 0.2 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fixed_BCHW = with_colors_of(grain_BChw, torch.zeros(1, 3, 256, 256))
    assert fixed_BCHW.std() < 0.2 * grain_BChw.std()


def test_a_wide_spread_takes_less() -> None:
    x_BCHW, small_BChw = torch.zeros(1, 3, 64, 64), rendered(16, 16, batch=1)
    taken = [with_colors_of(small_BChw, x_BCHW, spread).std() for spread in (0.5, 2.0, 8.0)]
    assert taken == sorted(taken, reverse=True)


@pytest.mark.parametrize("size", [(48, 64), (50, 61)])
def test_every_image_is_computed_by_itself(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x_BCHW, small_BChw = (torch.randn(5, 3, *sides, generator=generator) for sides in (size, (12, 16)))
    together_BCHW = with_colors_of(small_BChw, x_BCHW)
    alone = [with_colors_of(small_BChw[i : i + 1].clone(), x_BCHW[i : i + 1].clone()) for i in range(5)]
    assert torch.equal(together_BCHW, torch.cat(alone))


def test_without_a_small_picture_nothing_happens() -> None:
    x_BCHW = rendered(8, 8)
    assert with_colors_of(None, x_BCHW) is x_BCHW
