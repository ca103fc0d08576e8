"""Fast sampling: solvers that remember earlier predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from floyd.diffusion.multistep import DPMSolver, Rule, Scale, UniPC
from floyd.diffusion.samplers import Variance
from floyd.diffusion.timesteps import checked
from floyd.errors import ConfigError
from floyd.schedulers.solvers import SolverConfig, SolverScheduler
from floyd.store.config import Config


@dataclass(frozen=True, kw_only=True)
class MultistepConfig(SolverConfig):
    solver_order: int = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    lower_order_final: bool = True
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._order()
        self._flag("lower_order_final")


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepConfig(MultistepConfig):
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    lambda_min_clipped: float = -math.inf
    variance_type: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stand_in("algorithm_type", ("deis",), "dpmsolver++")
        self._stand_in("solver_type", ("logrho", "bh1", "bh2"), "midpoint")
        self._one_of("algorithm_type", ("dpmsolver++", "sde-dpmsolver++"))
        self._one_of("solver_type", get_args(Rule))
        self._flag("euler_at_final")
        if type(self.lambda_min_clipped) not in (int, float) or math.isnan(self.lambda_min_clipped):
            raise ConfigError(f"lambda_min_clipped must be a number, got {self.lambda_min_clipped!r}.")
        if self.variance_type is not None:
            self._one_of("variance_type", ("learned", *get_args(Variance)))


@dataclass(frozen=True, kw_only=True)
class UniPCMultistepConfig(MultistepConfig):
    predict_x0: bool = True
    solver_type: str = "bh2"
    disable_corrector: tuple[int, ...] = ()
    solver_p: Any = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stand_in("solver_type", ("midpoint", "heun", "logrho"), "bh2")
        self._one_of("solver_type", get_args(Scale))
        if self.predict_x0 is not True:
            raise ConfigError(f"predict_x0 must be true, got {self.predict_x0!r}.")
        if self.solver_p is not None:
            raise ConfigError(f"solver_p must be null, got {self.solver_p!r}.")
        if not all(type(index) is int for index in self.disable_corrector):
            raise ConfigError(f"disable_corrector must hold indexes of steps, got {self.disable_corrector!r}.")


class _Multistep(SolverScheduler):
    def _spaced(self, count: int) -> tuple[int, ...]:
        """One timestep more than asked for, without the cleanest: the last step goes to the clean picture itself."""
        num_train, end = self.config.num_train_timesteps, self._end()
        if not 1 <= count < num_train:
            raise ValueError(f"The number of inference steps must be in [1, {num_train}), got {count}.")
        match self.config.timestep_spacing:
            case "linspace":
                table = [round((end - 1) * i / count) for i in range(count, 0, -1)]
            case "leading":
                table = [i * (end // (count + 1)) + self.config.steps_offset for i in range(count, 0, -1)]
            case _:
                stride = num_train / count
                table = [round(end - i * stride) - 1 for i in range(math.ceil(end / stride))]
        return checked(table, num_train)

    def _end(self) -> int:
        """The number of timesteps in use."""
        return int(self.config.num_train_timesteps)


class DPMSolverMultistepScheduler(_Multistep):
    """DPM-Solver++ 2M (arXiv:2211.01095), or its stochastic form. The noisiest timesteps, where the signal's logarithm
    lies below `lambda_min_clipped`, are left out: the cosine schedule needs it."""

    config_class: ClassVar[type[Config]] = DPMSolverMultistepConfig

    def sampler(self, num_inference_steps: int | None = None, *, eta: float = 0.0) -> DPMSolver:
        """A sampler for one call; the table of timesteps alone decides where each step goes."""
        config = self.config
        return DPMSolver(
            self.schedule,
            order=config.solver_order,
            rule=config.solver_type,
            is_stochastic=config.algorithm_type == "sde-dpmsolver++",
            lower_order_final=config.lower_order_final,
            euler_at_final=config.euler_at_final,
            **self._solver(eta),
        )

    def _end(self) -> int:
        alpha_bar_T = self.schedule.alpha_bar_T
        log_snr_T = alpha_bar_T.sqrt().log() - (1 - alpha_bar_T).sqrt().log()
        end = int((log_snr_T >= self.config.lambda_min_clipped).sum())
        if end < 2:
            raise ConfigError(
                f"lambda_min_clipped must be below {log_snr_T[1].item():.4g}, or no timestep is left; "
                f"got {self.config.lambda_min_clipped}."
            )
        return end


class UniPCMultistepScheduler(_Multistep):
    """UniPC (arXiv:2302.04867)."""

    config_class: ClassVar[type[Config]] = UniPCMultistepConfig

    def sampler(self, num_inference_steps: int | None = None, *, eta: float = 0.0) -> UniPC:
        """A sampler for one call; the table of timesteps alone decides where each step goes."""
        config = self.config
        return UniPC(
            self.schedule,
            order=config.solver_order,
            scale=config.solver_type,
            lower_order_final=config.lower_order_final,
            uncorrected=config.disable_corrector,
            **self._solver(eta),
        )
