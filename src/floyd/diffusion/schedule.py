"""How fast a picture drowns in noise: one table of signal levels, read by samplers, canvases and losses.

B images   C channels   H height   W width   T training timesteps
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How much of the clean image survives at each training timestep.

    The table is float32 on the CPU whatever the model runs in; whoever computes elsewhere gets a copy.
    """

    alpha_bar_T: Tensor  # float32, not increasing, in [0, 1]

    def __post_init__(self) -> None:
        table = torch.as_tensor(self.alpha_bar_T)
        if table.ndim != 1 or not len(table) or not table.is_floating_point():
            raise ValueError(
                f"alpha_bar_T must be one row of floating point numbers, got {table.dtype} {list(table.shape)}."
            )
        if not bool(((table >= 0) & (table <= 1)).all()) or bool((table.diff() > 0).any()):
            raise ValueError("alpha_bar_T must lie in [0, 1] and never increase: noise is only ever added.")
        object.__setattr__(self, "alpha_bar_T", table.detach().to("cpu", torch.float32, copy=True))

    def __len__(self) -> int:
        return len(self.alpha_bar_T)

    @classmethod
    def of_betas(cls, betas: Sequence[float] | Tensor) -> Self:
        """From the noise added at each timestep (DDPM, arXiv:2006.11239, section 2)."""
        beta_T = torch.as_tensor(betas, dtype=torch.float32)
        if beta_T.ndim != 1 or not len(beta_T) or not bool(((beta_T >= 0) & (beta_T <= 1)).all()):
            raise ValueError("betas must be a non-empty row of numbers in [0, 1].")
        return cls((1.0 - beta_T).cumprod(0))

    @classmethod
    def cosine(cls, num_steps: int = 1000, max_beta: float = 0.999) -> Self:
        """Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17; the schedule of IF."""

        def survival(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        edges = [i / _at_least_one(num_steps) for i in range(num_steps + 1)]
        return cls.of_betas([min(1 - survival(b) / survival(a), max_beta) for a, b in pairwise(edges)])

    @classmethod
    def linear(cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """DDPM (arXiv:2006.11239), section 4."""
        return cls.of_betas(torch.linspace(beta_start, beta_end, _at_least_one(num_steps), dtype=torch.float32))

    @classmethod
    def scaled_linear(cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """Linear in the square root of beta, as latent diffusion has it (arXiv:2112.10752); the x4 upscaler's."""
        root_T = torch.linspace(beta_start**0.5, beta_end**0.5, _at_least_one(num_steps), dtype=torch.float32)
        return cls.of_betas(root_T**2)

    @classmethod
    def sigmoid(cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """Beta rises as a sigmoid over [-6, 6], as in GeoDiff (arXiv:2203.02923)."""
        ramp_T = torch.sigmoid(torch.linspace(-6, 6, _at_least_one(num_steps)))
        return cls.of_betas(ramp_T * (beta_end - beta_start) + beta_start)

    def with_zero_terminal_snr(self) -> Self:
        """The same schedule stretched to end in pure noise (arXiv:2305.08891, algorithm 1)."""
        root_T = self.alpha_bar_T.sqrt()
        first, last = root_T[0], root_T[-1]
        stretched_T = ((root_T - last) * (first / (first - last))) ** 2
        alpha_T = torch.cat([stretched_T[:1], stretched_T[1:] / stretched_T[:-1]])
        return type(self).of_betas(1 - alpha_T)

    def alpha_bar(self, t: int) -> Tensor:
        """The surviving signal after timestep `t`, as a 0-dim tensor; before the first (-1) all of it survives."""
        return self.alpha_bar_T[self._checked(t)] if t >= 0 else torch.tensor(1.0)

    def alpha_bar_at(self, t: int | Tensor, like: Tensor) -> Tensor:
        """The surviving signal in float32, shaped to multiply `like` and on its device; one `t`, or one per image."""
        if not isinstance(t, Tensor):
            return self.alpha_bar_T[self._checked(t)].to(like.device)
        if (
            t.is_floating_point()
            or t.dtype == torch.bool
            or t.ndim > 1
            or (t.ndim == 1 and len(t) not in (1, len(like)))
        ):
            raise ValueError(
                f"t must be an int or one integer per image ({len(like)}), got {t.dtype} of shape {list(t.shape)}."
            )
        if t.numel() and not 0 <= int(t.min()) <= int(t.max()) < len(self):
            raise ValueError(f"t must be in [0, {len(self)}), got values from {int(t.min())} to {int(t.max())}.")
        chosen = self.alpha_bar_T.to(t.device)[t.long()].to(like.device)
        return chosen if t.ndim == 0 else chosen.view(-1, *[1] * (like.ndim - 1))

    def noised(self, clean_BCHW: Tensor, noise_BCHW: Tensor, t: int | Tensor) -> Tensor:
        """q(x_t | x_0): DDPM (arXiv:2006.11239), eq. 4. Half precision is computed in float32 and cast back."""
        alpha_bar = self.alpha_bar_at(t, clean_BCHW)
        x_BCHW = alpha_bar**0.5 * at_least_float32(clean_BCHW) + (1 - alpha_bar) ** 0.5 * at_least_float32(noise_BCHW)
        return x_BCHW.to(clean_BCHW.dtype)

    def velocity(self, clean_BCHW: Tensor, noise_BCHW: Tensor, t: int | Tensor) -> Tensor:
        """What a velocity model predicts: progressive distillation (arXiv:2202.00512), appendix D."""
        alpha_bar = self.alpha_bar_at(t, clean_BCHW)
        v_BCHW = alpha_bar**0.5 * at_least_float32(noise_BCHW) - (1 - alpha_bar) ** 0.5 * at_least_float32(clean_BCHW)
        return v_BCHW.to(clean_BCHW.dtype)

    def _checked(self, t: int) -> int:
        if not 0 <= t < len(self):
            raise ValueError(f"t must be in [0, {len(self)}), got {t}.")
        return t


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is for models; the arithmetic around them needs more digits than it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _at_least_one(num_steps: int) -> int:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    return num_steps
