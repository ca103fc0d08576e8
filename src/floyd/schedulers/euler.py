"""Euler's and Heun's methods in the noise level.

Timesteps are whole numbers: where the incumbent's linspace lies between two, the nearest is taken, sigma included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from floyd.diffusion.solvers import Euler, EulerAncestral, Heun, with_corrections
from floyd.diffusion.timesteps import Step
from floyd.schedulers.solvers import SolverConfig, SolverScheduler
from floyd.store.config import Config


@dataclass(frozen=True, kw_only=True)
class EulerDiscreteConfig(SolverConfig):
    interpolation_type: str = "linear"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: str = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("interpolation_type", ("linear",))
        self._one_of("timestep_type", ("discrete",))


@dataclass(frozen=True, kw_only=True)
class EulerAncestralDiscreteConfig(SolverConfig):
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True, kw_only=True)
class HeunDiscreteConfig(SolverConfig):
    beta_start: float = 0.00085
    beta_end: float = 0.012
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0


class EulerDiscreteScheduler(SolverScheduler):
    """Euler's method (arXiv:2206.00364)."""

    config_class: ClassVar[type[Config]] = EulerDiscreteConfig

    def sampler(self, num_inference_steps: int | None = None, *, eta: float = 0.0) -> Euler:
        """A sampler for one call; the table of timesteps alone decides where each step goes."""
        return Euler(self.schedule, **self._solver(eta))


class EulerAncestralDiscreteScheduler(SolverScheduler):
    """Euler's method with fresh noise at every step. It always ends clean."""

    config_class: ClassVar[type[Config]] = EulerAncestralDiscreteConfig

    def sampler(self, num_inference_steps: int | None = None, *, eta: float = 0.0) -> EulerAncestral:
        """A sampler for one call; the table of timesteps alone decides where each step goes."""
        return EulerAncestral(self.schedule, **{**self._solver(eta), "ends_clean": True})


class HeunDiscreteScheduler(SolverScheduler):
    """Heun's method (arXiv:2206.00364): n timesteps are 2n - 1 evaluations, or 2n - 2 from pure noise of the cosine
    schedule, which is not corrected. It always ends clean."""

    config_class: ClassVar[type[Config]] = HeunDiscreteConfig

    def steps(self, timesteps: Iterable[int], strength: float = 1.0) -> tuple[Step, ...]:
        """The moves along a table, each followed by its correction, but for the last and those from pure noise."""
        return with_corrections(super().steps(timesteps, strength), self.schedule)

    def sampler(self, num_inference_steps: int | None = None, *, eta: float = 0.0) -> Heun:
        """A sampler for one call; the table of timesteps alone decides where each step goes."""
        return Heun(self.schedule, **{**self._solver(eta), "ends_clean": True})
