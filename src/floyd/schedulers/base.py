"""What the schedulers share: the keys of their file, the noise schedule, and the choice of timesteps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor

from floyd.diffusion.limits import Clip, DynamicThreshold, Limit
from floyd.diffusion.samplers import Sampler
from floyd.diffusion.schedule import NoiseSchedule
from floyd.diffusion.timesteps import Step, checked, respaced, spaced, steps_of
from floyd.errors import ConfigError
from floyd.store.config import Config
from floyd.store.pretrained import Configured

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")

_FLAGS = ("clip_sample", "thresholding", "rescale_betas_zero_snr")
_WHOLE, _REAL = (int,), (int, float)
_NUMBERS: dict[str, tuple[tuple[type, ...], Callable[[float], bool], str]] = {
    "num_train_timesteps": (_WHOLE, lambda n: n >= 1, "a whole number of at least 1"),
    "steps_offset": (_WHOLE, lambda n: n >= 0, "a whole number of at least 0"),
    "clip_sample_range": (_REAL, lambda x: x > 0, "a positive number"),
    "sample_max_value": (_REAL, lambda x: x > 0, "a positive number"),
    "dynamic_thresholding_ratio": (_REAL, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "beta_start": (_REAL, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "beta_end": (_REAL, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """The keys of `scheduler_config.json` that every scheduler of ours knows; the others are checked where present."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(float(beta) for beta in self.trained_betas))
        self._one_of("beta_schedule", BETA_SCHEDULES)
        self._one_of("prediction_type", PREDICTION_TYPES)
        self._one_of("timestep_spacing", TIMESTEP_SPACINGS)
        for key, (kind, is_allowed, words) in _NUMBERS.items():
            if key not in self:
                continue
            if type(self[key]) not in kind or not is_allowed(self[key]):
                raise ConfigError(f"{key} must be {words}, got {self[key]!r}.")
        for key in _FLAGS:
            if key in self and type(self[key]) is not bool:
                raise ConfigError(f"{key} must be true or false, got {self[key]!r}.")
        self._check_trained_betas()

    def _one_of(self, key: str, allowed: tuple[str, ...]) -> None:
        if self[key] not in allowed:
            raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {self[key]!r}.")

    def _check_trained_betas(self) -> None:
        betas = self.trained_betas
        if betas is None:
            return
        if len(betas) != self.num_train_timesteps:
            raise ConfigError(
                f"trained_betas must hold one beta for each of the {self.num_train_timesteps} num_train_timesteps, "
                f"got {len(betas)}."
            )
        if not all(0 <= beta <= 1 for beta in betas):
            raise ConfigError(f"trained_betas must lie in [0, 1], got {min(betas)} to {max(betas)}.")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(TrainingConfig):
    """What DDPM and DDIM know besides."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False


class Scheduler(Configured, ABC):
    """A component of a pipeline: how its model was noised, and how to sample from it.

    It never changes. What a call needs, a table of timesteps and a sampler, is made fresh for it, so calls may share
    one scheduler.
    """

    config_name: ClassVar[str] = "scheduler_config.json"
    config: Any  # each scheduler's own TrainingConfig

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.schedule = _schedule(self.config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from a configuration file's content, or from the `.config` of another scheduler.

        What says how the model was trained carries over, and so do keys that are not ours. Only a spacing that is the
        other scheduler's default gives way to the default of this one: nobody chose it.
        """
        if isinstance(config, Config) and not isinstance(config, cls.config_class):
            defaults = {f.name: f.default for f in fields(config)}
            if config.get("timestep_spacing") == defaults.get("timestep_spacing"):
                config = {key: value for key, value in config.items() if key != "timestep_spacing"}
        return super().from_config(config, **overrides)

    def timesteps_for(
        self, num_inference_steps: int | None = None, *, timesteps: Iterable[int] | str | None = None
    ) -> tuple[int, ...]:
        """The table of a call: so many steps spaced as the config says, or a table or respacing string of one's own."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"Give either num_inference_steps or timesteps, got num_inference_steps={num_inference_steps} and "
                f"timesteps={timesteps}."
            )
        num_train = self.config.num_train_timesteps
        if isinstance(timesteps, str):
            return respaced(timesteps, num_train)
        if timesteps is not None:
            return checked(timesteps, num_train)
        assert num_inference_steps is not None
        return self._spaced(num_inference_steps)

    def steps(self, timesteps: Iterable[int], strength: float = 1.0) -> tuple[Step, ...]:
        """The moves along a table; `strength` < 1 skips the noisiest ones."""
        return steps_of(timesteps, strength)

    def _spaced(self, count: int) -> tuple[int, ...]:
        config = self.config
        return spaced(
            count, config.num_train_timesteps, spacing=config.timestep_spacing, steps_offset=config.steps_offset
        )

    @abstractmethod
    def sampler(self, num_inference_steps: int | None = None, *, eta: float = 0.0) -> Sampler:
        """A sampler for one call; name the number of steps unless the table is a custom one."""

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """`original` at the noise level of `timesteps`: one for all images or one for each."""
        return self.schedule.noised(original, noise, timesteps)

    @property
    def limit(self) -> Limit | None:
        """How the predicted clean picture is kept in range; thresholding replaces clipping.

        It belongs to the model: schedulers that have no such key of their own heed one that was carried over.
        """
        config = self.config
        if config.get("thresholding", False):
            return DynamicThreshold(
                config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
            )
        return Clip(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", False) else None


def _schedule(config: TrainingConfig) -> NoiseSchedule:
    if config.trained_betas is not None:
        schedule = NoiseSchedule.of_betas(config.trained_betas)
    elif config.beta_schedule == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(config.num_train_timesteps)
    else:
        rules = {
            "linear": NoiseSchedule.linear,
            "scaled_linear": NoiseSchedule.scaled_linear,
            "sigmoid": NoiseSchedule.sigmoid,
        }
        schedule = rules[config.beta_schedule](config.num_train_timesteps, config.beta_start, config.beta_end)
    return schedule.with_zero_terminal_snr() if config.get("rescale_betas_zero_snr", False) else schedule
