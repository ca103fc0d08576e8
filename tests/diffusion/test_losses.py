"""B images  T training timesteps"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from floyd.diffusion.losses import (
    hybrid_loss,
    layout_density,
    log_snr,
    snr_weights,
    stratified_timesteps,
    variational_bound,
)
from floyd.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.cosine()
LATER = torch.tensor([1, 30, 400, 700])  # t > 0


def pictures(batch: int) -> tuple[Tensor, Tensor]:
    """Clean pixels and noise."""
    return torch.rand(batch, 3, 4, 4) * 2 - 1, torch.randn(batch, 3, 4, 4)


def variances(t_B: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest (posterior) and the largest (beta) variance at t > 0, in float64: DDPM, eq. 7."""
    abar_T = SCHEDULE.alpha_bar_T.double()
    abar_B, before_B = abar_T[t_B], abar_T[t_B - 1]
    beta_B = 1 - abar_B / before_B
    return (1 - before_B) / (1 - abar_B) * beta_B, beta_B


def bound(fraction: float, t_B: Tensor, error: float = 0.0) -> Tensor:
    clean_BCHW, noise_BCHW = pictures(len(t_B))
    fraction_BCHW = torch.full_like(clean_BCHW, fraction)
    return variational_bound(noise_BCHW + error, fraction_BCHW, clean_BCHW * 0.5, noise_BCHW, t_B, SCHEDULE)


def test_the_exact_prediction_with_the_smallest_variance_costs_nothing() -> None:
    torch.testing.assert_close(bound(-1.0, LATER), torch.zeros(4), atol=1e-5, rtol=0)


def test_the_exact_prediction_with_the_largest_variance_costs_the_divergence_of_two_gaussians() -> None:
    smallest_B, largest_B = variances(LATER)
    nats_B = 0.5 * ((largest_B / smallest_B).log() - 1 + smallest_B / largest_B)
    torch.testing.assert_close(bound(1.0, LATER).double(), nats_B / math.log(2), atol=1e-4, rtol=2e-3)


def test_a_wrong_mean_costs_its_square_over_twice_the_variance() -> None:
    t_B, error = torch.tensor([30, 400]), 0.01
    abar_B, before_B = SCHEDULE.alpha_bar_T.double()[t_B], SCHEDULE.alpha_bar_T.double()[t_B - 1]
    smallest_B, beta_B = variances(t_B)
    clean_error_B = error * (1 - abar_B).sqrt() / abar_B.sqrt()
    gap_B = before_B.sqrt() * beta_B / (1 - abar_B) * clean_error_B
    expected_B = gap_B.square() / (2 * smallest_B) / math.log(2)
    torch.testing.assert_close(bound(-1.0, t_B, error).double(), expected_B, atol=1e-5, rtol=1e-2)


def test_the_last_step_is_a_distribution_over_the_256_pixel_values() -> None:
    clean_B111 = torch.linspace(-1, 1, 256).view(-1, 1, 1, 1)
    abar = SCHEDULE.alpha_bar(0)
    x = 0.3  # the same noisy pixel, whichever clean one it came from
    noise_B111 = (x - abar.sqrt() * clean_B111) / (1 - abar).sqrt()
    prediction_B111 = torch.full_like(clean_B111, 0.2)
    t_B = torch.zeros(256, dtype=torch.long)
    bits_B = variational_bound(
        prediction_B111, torch.zeros_like(clean_B111), clean_B111, noise_B111, t_B, SCHEDULE
    ).double()
    assert float((0.5**bits_B).sum()) == pytest.approx(1.0, abs=1e-4)


def test_the_hybrid_loss_weighs_the_squared_error_by_the_timestep() -> None:
    clean_BCHW, noise_BCHW = pictures(4)
    out_BCHW = torch.cat([noise_BCHW + 0.1, torch.zeros_like(noise_BCHW)], dim=1)
    weight_T = torch.arange(1000.0)
    simple_B, _ = hybrid_loss(out_BCHW, clean_BCHW, noise_BCHW, LATER, SCHEDULE, weight_T)
    torch.testing.assert_close(simple_B, LATER * 0.01, rtol=1e-4, atol=0)


def test_the_variance_is_learned_without_moving_the_mean() -> None:
    clean_BCHW, noise_BCHW = pictures(4)
    out_BCHW = torch.cat([noise_BCHW + 0.1, torch.zeros_like(noise_BCHW)], dim=1).requires_grad_()
    _, bound_B = hybrid_loss(out_BCHW, clean_BCHW, noise_BCHW, LATER, SCHEDULE, torch.ones(1000))
    (gradient_BCHW,) = torch.autograd.grad(bound_B.sum(), out_BCHW)
    assert gradient_BCHW[:, :3].count_nonzero() == 0
    assert gradient_BCHW[:, 3:].count_nonzero() > 0


def test_the_weights_are_min_snr_between_the_bounds_of_the_snr() -> None:
    snr_T = log_snr(SCHEDULE).double().exp()
    weight_T = snr_weights(SCHEDULE, low=1.0, high=5.0, most=60.0).double()
    between = (snr_T > 1) & (snr_T < 5)
    assert between.any()
    torch.testing.assert_close(weight_T[between], torch.ones_like(weight_T[between]))
    torch.testing.assert_close(weight_T[snr_T > 5], 5 / snr_T[snr_T > 5], rtol=1e-5, atol=0)
    noisy = (snr_T < 1) & (snr_T > 1 / 60)
    torch.testing.assert_close(weight_T[noisy], 1 / snr_T[noisy], rtol=1e-5, atol=0)
    assert (weight_T[snr_T < 1 / 60] == 60).all()


def test_log_snr_is_the_log_of_signal_over_noise() -> None:
    abar_T = SCHEDULE.alpha_bar_T.double()
    torch.testing.assert_close(log_snr(SCHEDULE).double(), (abar_T / (1 - abar_T)).log(), rtol=1e-4, atol=1e-4)


def test_stratified_timesteps_visit_a_uniform_density_once_each(generator: torch.Generator) -> None:
    t_B = stratified_timesteps(torch.ones(50), 50, generator)
    assert sorted(t_B.tolist()) == list(range(50))
    assert t_B.tolist() != list(range(50))  # in random order


def test_stratified_timesteps_cover_their_density(generator: torch.Generator) -> None:
    density_T = torch.tensor([0.0, 5.0, 1.0, 0.0, 4.0])
    counts_T = torch.bincount(stratified_timesteps(density_T, 1000, generator), minlength=5)
    assert counts_T[density_T == 0].sum() == 0
    assert ((counts_T - 1000 * density_T / density_T.sum()).abs() < 2).all()  # one of each share: no luck involved


def test_half_of_the_layout_density_is_spread_over_the_noisy_log_snr() -> None:
    density_T = layout_density(SCHEDULE, low=-8.0, high=2.0, share=0.5).double()
    assert float(density_T.sum()) == pytest.approx(1.0, abs=1e-5)
    log_snr_T = log_snr(SCHEDULE)
    outside = (log_snr_T <= -8) | (log_snr_T >= 2)
    torch.testing.assert_close(density_T[outside], torch.full_like(density_T[outside], 0.5 / 1000))
    lower, upper = ((log_snr_T > a) & (log_snr_T < b) for a, b in ((-8, -3), (-3, 2)))
    extra_T = density_T - 0.5 / 1000
    assert float(extra_T[lower].sum()) == pytest.approx(float(extra_T[upper].sum()), rel=0.05)
