"""Implicit sampling, as the x4 upscaler was published with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from floyd.diffusion.samplers import Implicit
from floyd.errors import ConfigError
from floyd.schedulers.base import Scheduler, SchedulerConfig
from floyd.store.config import Config


@dataclass(frozen=True, kw_only=True)
class DDIMConfig(SchedulerConfig):
    set_alpha_to_one: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.set_alpha_to_one) is not bool:
            raise ConfigError(f"set_alpha_to_one must be true or false, got {self.set_alpha_to_one!r}.")


class DDIMScheduler(Scheduler):
    """DDIM (arXiv:2010.02502); a learned variance in the model's output is left unused."""

    config_class: ClassVar[type[Config]] = DDIMConfig

    def sampler(self, num_inference_steps: int | None = None, *, eta: float = 0.0) -> Implicit:
        """A sampler for one call, striding through time in `num_inference_steps`, or along a custom table if None."""
        num_train = self.config.num_train_timesteps
        if num_inference_steps is not None and not 1 <= num_inference_steps <= num_train:
            raise ValueError(f"num_inference_steps must be in [1, {num_train}], got {num_inference_steps}.")
        return Implicit(
            self.schedule,
            prediction=self.config.prediction_type,
            limit=self.limit,
            eta=eta,
            stride=None if num_inference_steps is None else num_train // num_inference_steps,
            ends_clean=self.config.set_alpha_to_one,
        )
