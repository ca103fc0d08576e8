"""What the schedulers of fast solvers share: the keys of their files, and what of them can be honoured."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from floyd.diffusion.schedule import NoiseSchedule
from floyd.errors import ConfigError
from floyd.schedulers.base import Scheduler, TrainingConfig

FINAL_SIGMAS = ("zero", "sigma_min")
_LEAST_ALPHA_BAR = 2**-24  # in place of 0, whose sigma would be infinite

# Keys of other noise levels than those of training, or of other models; only these values can be honoured.
_HONOURED: dict[str, tuple[Any, ...]] = {
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "shift_terminal": (None,),
    "sigma_min": (None,),
    "sigma_max": (None,),
}


@dataclass(frozen=True, kw_only=True)
class SolverConfig(TrainingConfig):
    timestep_spacing: str = "linspace"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, allowed in _HONOURED.items():
            if self.get(key) not in allowed:
                raise ConfigError(
                    f"{key} must be {json.dumps(allowed[0])}, got {self[key]!r}: levels are those of the timesteps."
                )
        if "final_sigmas_type" in self.known_keys():
            self._one_of("final_sigmas_type", FINAL_SIGMAS)

    def _flag(self, *keys: str) -> None:
        for key in keys:
            if type(self[key]) is not bool:
                raise ConfigError(f"{key} must be true or false, got {self[key]!r}.")

    def _order(self) -> None:
        if type(self["solver_order"]) is not int or self["solver_order"] not in (1, 2):
            raise ConfigError(f"solver_order must be 1 or 2, got {self['solver_order']!r}.")

    def _stand_in(self, key: str, others: tuple[str, ...], ours: str) -> None:
        """Another solver's value for a key of the same name becomes the one that is closest here."""
        if self[key] in others:
            object.__setattr__(self, key, ours)


class SolverScheduler(Scheduler):
    """A scheduler whose sampler solves the differential equation of the noise levels.

    A variance that the model predicts is left unused; limits of the clean picture in the config are heeded.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        table_T = self.schedule.alpha_bar_T
        if table_T[-1] < _LEAST_ALPHA_BAR and self.config.get("rescale_betas_zero_snr", False):
            last_1 = (table_T[-2:-1] / 2).clamp(max=_LEAST_ALPHA_BAR)
            self.schedule = NoiseSchedule(torch.cat([table_T[:-1], last_1]))

    def _solver(self, eta: float) -> dict[str, Any]:
        """The keywords that every solver takes."""
        if eta != 0:
            warnings.warn(
                f"eta={eta} has no effect with {type(self).__name__}; "
                "DDIMScheduler.from_config(scheduler.config) heeds it.",
                stacklevel=3,
            )
        return {
            "prediction": self.config.prediction_type,
            "limit": self.limit,
            "ends_clean": self.config.get("final_sigmas_type", "zero") == "zero",
        }
