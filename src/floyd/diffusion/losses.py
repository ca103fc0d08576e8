"""What a denoiser is trained on: the noise, and how sure it is of it.

B images  C channels  H height  W width  T training timesteps
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from floyd.diffusion.schedule import NoiseSchedule


def log_snr(schedule: NoiseSchedule) -> Tensor:
    """log(alpha_bar / (1 - alpha_bar)) of every timestep, [T], float32."""
    alpha_bar_T = schedule.alpha_bar_T.double()
    return (alpha_bar_T.log() - (1 - alpha_bar_T).log()).float()


def snr_weights(schedule: NoiseSchedule, *, low: float = 1.0, high: float = 5.0, most: float = 60.0) -> Tensor:
    """Weights [T] of the noise's squared error: clamp(SNR, low, high) / SNR, at most `most`.

    `high` is min-SNR's gamma (arXiv:2303.09556, section 3.4): clean pictures do not drown the rest. `low` weighs the
    noisy end by the error of the clean picture instead, which the noise's own error hardly shows there.
    """
    snr_T = log_snr(schedule).exp()
    return (snr_T.clamp(low, high) / snr_T).clamp(max=most)


def stratified_timesteps(density_T: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """`batch` timesteps [B] of the density, one from each of `batch` equal shares of it, in random order."""
    edges_T = (density_T.double() / density_T.double().sum()).cumsum(0)
    share_B = (torch.arange(batch, dtype=torch.float64) + torch.rand(batch, generator=generator)) / batch
    t_B = torch.searchsorted(edges_T, share_B).clamp(max=len(edges_T) - 1)
    return t_B[torch.randperm(batch, generator=generator)]


def layout_density(schedule: NoiseSchedule, *, low: float = -8.0, high: float = 2.0, share: float = 0.5) -> Tensor:
    """Density [T]: uniform in t, but for a `share` that is uniform in log SNR between `low` and `high`.

    Where things are is settled in few, very noisy timesteps of the cosine schedule; uniform sampling seldom sees them.
    """
    log_snr_T = log_snr(schedule)
    gap_T = -torch.diff(log_snr_T, prepend=log_snr_T[:1])
    inside_T = gap_T * ((log_snr_T > low) & (log_snr_T < high))
    return (1 - share) / len(log_snr_T) + share * inside_T / inside_T.sum()


def hybrid_loss(
    out_BCHW: Tensor,
    clean_BCHW: Tensor,
    noise_BCHW: Tensor,
    t_B: Tensor,
    schedule: NoiseSchedule,
    weight_T: Tensor,
    weight_B1HW: Tensor | float = 1.0,
    *,
    wanted_BCHW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L_simple (weighted by timestep and by pixel) and the variational bound of the learned variance, each [B].

    `wanted` is what L_simple asks for instead of the noise.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 16: L_hybrid = L_simple + lambda * L_vlb with lambda = 0.001, and the
    mean held fixed in the second term. For a schedule of 1000 steps lambda * T is 1: the sum of both is the loss.
    """
    channels = clean_BCHW.shape[1]
    noise_hat_BCHW, fraction_BCHW = out_BCHW.float().split(channels, dim=1)
    wanted_BCHW = noise_BCHW if wanted_BCHW is None else wanted_BCHW
    error_B = ((noise_hat_BCHW - wanted_BCHW).square() * weight_B1HW).flatten(1).mean(1)
    bound_B = variational_bound(noise_hat_BCHW.detach(), fraction_BCHW, clean_BCHW, noise_BCHW, t_B, schedule)
    return weight_T.to(error_B.device)[t_B] * error_B, bound_B * (len(schedule) / 1000)


def variational_bound(
    noise_hat_BCHW: Tensor,
    fraction_BCHW: Tensor,
    clean_BCHW: Tensor,
    noise_BCHW: Tensor,
    t_B: Tensor,
    schedule: NoiseSchedule,
) -> Tensor:
    """One term of the variational bound [B], in bits per value: DDPM (arXiv:2006.11239), eq. 5.

    `fraction` in [-1, 1] places the log-variance between its bounds (arXiv:2102.09672, eq. 15).
    """
    alpha_bar_T = schedule.alpha_bar_T.to(clean_BCHW.device)
    shape = (-1, 1, 1, 1)
    abar = alpha_bar_T[t_B].view(shape)
    abar_prev = torch.where(t_B > 0, alpha_bar_T[(t_B - 1).clamp(min=0)], torch.ones_like(t_B, dtype=torch.float32))
    abar_prev = abar_prev.view(shape)
    alpha = abar / abar_prev
    beta = 1 - alpha
    posterior = (1 - abar_prev) / (1 - abar) * beta
    first = (1 - alpha_bar_T[0]) / (1 - alpha_bar_T[1]) * (1 - alpha_bar_T[1] / alpha_bar_T[0])
    smallest = torch.where(t_B.view(shape) > 0, posterior, first).clamp(min=1e-20).log()
    log_var_BCHW = (fraction_BCHW + 1) / 2 * beta.log() + (1 - fraction_BCHW) / 2 * smallest

    noisy_BCHW = abar.sqrt() * clean_BCHW + (1 - abar).sqrt() * noise_BCHW
    clean_hat_BCHW = ((noisy_BCHW - (1 - abar).sqrt() * noise_hat_BCHW) / abar.sqrt()).clamp(-1, 1)
    to_clean = abar_prev.sqrt() * beta / (1 - abar)
    gap_BCHW = to_clean * (clean_BCHW - clean_hat_BCHW)  # of the means: their share of x is the same and cancels
    kl_BCHW = 0.5 * (log_var_BCHW - smallest - 1 + (smallest - log_var_BCHW).exp())
    kl_BCHW = kl_BCHW + 0.5 * gap_BCHW.square() * (-log_var_BCHW).exp()
    mean_BCHW = to_clean * clean_hat_BCHW + alpha.sqrt() * (1 - abar_prev) / (1 - abar) * noisy_BCHW
    bits_BCHW = torch.where(t_B.view(shape) > 0, kl_BCHW, -_log_likelihood(clean_BCHW, mean_BCHW, log_var_BCHW))
    return bits_BCHW.flatten(1).mean(1) / math.log(2)


def _log_likelihood(clean_BCHW: Tensor, mean_BCHW: Tensor, log_var_BCHW: Tensor) -> Tensor:
    """log p of pixels in steps of 1/127.5 under a Gaussian: DDPM (arXiv:2006.11239), eq. 13."""
    inverse_std = (-0.5 * log_var_BCHW).exp()
    offset = clean_BCHW - mean_BCHW

    def below(edge: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf(inverse_std * edge / math.sqrt(2)))

    upper, lower = below(offset + 1 / 255), below(offset - 1 / 255)
    upper = torch.where(clean_BCHW > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(clean_BCHW < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()
