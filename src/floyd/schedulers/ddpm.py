"""Ancestral sampling, as IF was published with it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, get_args

from floyd.diffusion.samplers import Ancestral, Variance
from floyd.schedulers.base import Scheduler, SchedulerConfig
from floyd.store.config import Config


@dataclass(frozen=True, kw_only=True)
class DDPMConfig(SchedulerConfig):
    variance_type: str = "fixed_small"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("variance_type", get_args(Variance))


class DDPMScheduler(Scheduler):
    """DDPM (arXiv:2006.11239), with fixed or learned variance."""

    config_class: ClassVar[type[Config]] = DDPMConfig

    def sampler(self, num_inference_steps: int | None = None, *, eta: float = 0.0) -> Ancestral:
        """A sampler for one call; the table of timesteps alone decides where each step goes."""
        if eta != 0:
            warnings.warn(
                f"eta={eta} has no effect with DDPMScheduler; DDIMScheduler.from_config(scheduler.config) heeds it.",
                stacklevel=2,
            )
        return Ancestral(
            self.schedule,
            prediction=self.config.prediction_type,
            variance=self.config.variance_type,
            limit=self.limit,
        )
