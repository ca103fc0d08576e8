"""How to go from one noise level down to the next.

A sampler is its algorithm and nothing else: frozen, and a step is a pure function of its arguments. Arithmetic is
float32 whatever the model runs in: the coefficients of a half precision chain overflow.

B images   C channels   H height   W width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, NamedTuple, Protocol, Self, get_args

import torch
from torch import Tensor

from floyd.diffusion.limits import Clip, Limit
from floyd.diffusion.noise import Noise
from floyd.diffusion.schedule import NoiseSchedule, at_least_float32
from floyd.diffusion.timesteps import Step

Target = Literal["epsilon", "v_prediction", "sample"]
Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"]


class Prediction(NamedTuple):
    """What the network said, its branches already combined."""

    target_BCHW: Tensor  # the noise, the velocity or the clean picture, as the sampler's `prediction` says
    variance_BCHW: Tensor | None = None  # in [-1, 1]: 0 .. 1 between the smallest and largest log-variance


class Move(NamedTuple):
    """Where a step arrives, and the clean picture it was heading for."""

    x_BCHW: Tensor
    clean_BCHW: Tensor


class Sampler(Protocol):
    @property
    def schedule(self) -> NoiseSchedule: ...

    def step(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> Move: ...


class Remembering(ABC):
    """A sampler whose move depends on the moves before it.

    Frozen like the others: a move hands back the sampler to go on with, so that chains may share the one they begin
    with, run after one another or in turns.
    """

    @abstractmethod
    def advance(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> tuple[Move, Self]:
        """The move, and the sampler that remembers it."""

    def step(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> Move:
        return self.advance(x_BCHW, pred, step, noise)[0]


def advanced(sampler: Sampler, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> tuple[Move, Sampler]:
    """The move, and the sampler of the next one: itself, unless it remembers."""
    if isinstance(sampler, Remembering):
        return sampler.advance(x_BCHW, pred, step, noise)
    return sampler.step(x_BCHW, pred, step, noise), sampler


@dataclass(frozen=True, eq=False)
class Ancestral:
    """DDPM sampling (arXiv:2006.11239), with the learned variance of arXiv:2102.09672.

    The last step adds no noise wherever the table ends, as in the original IF.
    """

    schedule: NoiseSchedule
    _: KW_ONLY
    prediction: Target = "epsilon"
    variance: Variance = "learned_range"
    limit: Limit | None = field(default_factory=Clip)

    def __post_init__(self) -> None:
        one_of("prediction", self.prediction, get_args(Target))
        one_of("variance", self.variance, get_args(Variance))

    def step(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> Move:
        x_BCHW = at_least_float32(x_BCHW)
        abar, abar_prev = self.schedule.alpha_bar(step.t), self.schedule.alpha_bar(step.t_prev)
        alpha = abar / abar_prev
        beta = 1 - alpha

        clean_BCHW = limited(clean_of(self.prediction, x_BCHW, at_least_float32(pred.target_BCHW), abar), self.limit)
        clean_weight = (abar_prev**0.5 * beta) / (1 - abar)  # DDPM, eq. 7
        x_weight = alpha**0.5 * (1 - abar_prev) / (1 - abar)
        mean_BCHW = clean_weight * clean_BCHW + x_weight * x_BCHW
        if step.is_last:
            return Move(mean_BCHW, clean_BCHW)
        spread = self._spread(pred.variance_BCHW, beta, (1 - abar_prev) / (1 - abar) * beta)
        return Move(mean_BCHW + spread * noise(mean_BCHW), clean_BCHW)

    def _spread(self, variance_BCHW: Tensor | None, beta: Tensor, smallest: Tensor) -> Tensor:
        """The standard deviation of the step, between the posterior's (`smallest`) and beta's."""
        smallest = smallest.clamp(min=1e-20)
        match self.variance:
            case "fixed_small":
                return smallest**0.5
            case "fixed_large":
                return beta**0.5
            case "fixed_small_log":
                return torch.exp(0.5 * smallest.log())
            case "fixed_large_log":
                return torch.exp(0.5 * beta.log())
            case "learned_range":  # arXiv:2102.09672, eq. 15
                if variance_BCHW is None:
                    raise ValueError(
                        "variance 'learned_range' needs a model that predicts its variance, and this one does not; "
                        "use 'fixed_small' or 'fixed_large'."
                    )
                fraction_BCHW = (at_least_float32(variance_BCHW) + 1) / 2
                log_variance_BCHW = fraction_BCHW * beta.log() + (1 - fraction_BCHW) * smallest.log()
                return torch.exp(0.5 * log_variance_BCHW)


@dataclass(frozen=True, eq=False)
class Implicit:
    """DDIM sampling (arXiv:2010.02502), eq. 12; `eta` 0 is deterministic, 1 is as noisy as ancestral.

    With a `stride` a step goes from t to t - stride, as the incumbent does for every spacing of a scheduler; without
    one it goes to the table's next entry, and the last step adds no noise.
    """

    schedule: NoiseSchedule
    _: KW_ONLY
    prediction: Target = "epsilon"
    limit: Limit | None = field(default_factory=Clip)
    eta: float = 0.0
    stride: int | None = None
    ends_clean: bool = True  # False: the last step ends at the first training timestep's noise level

    def __post_init__(self) -> None:
        one_of("prediction", self.prediction, get_args(Target))
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}.")
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}.")

    def step(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> Move:
        x_BCHW, target_BCHW = at_least_float32(x_BCHW), at_least_float32(pred.target_BCHW)
        t_prev = step.t_prev if self.stride is None else step.t - self.stride
        abar = self.schedule.alpha_bar(step.t)
        abar_prev = self.schedule.alpha_bar(t_prev if self.ends_clean else max(t_prev, 0))

        clean_BCHW = clean_of(self.prediction, x_BCHW, target_BCHW, abar)
        noise_BCHW = noise_of(self.prediction, x_BCHW, target_BCHW, abar)
        clean_BCHW = limited(clean_BCHW, self.limit)

        is_noisy = self.eta > 0 and not (self.stride is None and step.is_last)
        variance = ((1 - abar_prev) / (1 - abar)) * (1 - abar / abar_prev)  # eq. 16
        spread = self.eta * variance**0.5 if is_noisy else torch.tensor(0.0)
        x_BCHW = abar_prev**0.5 * clean_BCHW + (1 - abar_prev - spread**2) ** 0.5 * noise_BCHW
        if is_noisy:
            x_BCHW = x_BCHW + spread * noise(x_BCHW)
        return Move(x_BCHW, clean_BCHW)


def clean_of(prediction: Target, x_BCHW: Tensor, target_BCHW: Tensor, abar: Tensor) -> Tensor:
    """The clean picture that a prediction implies."""
    match prediction:
        case "epsilon":  # DDPM, eq. 15
            return (x_BCHW - (1 - abar) ** 0.5 * target_BCHW) / abar**0.5
        case "v_prediction":  # arXiv:2202.00512, appendix D
            return abar**0.5 * x_BCHW - (1 - abar) ** 0.5 * target_BCHW
        case "sample":
            return target_BCHW


def noise_of(prediction: Target, x_BCHW: Tensor, target_BCHW: Tensor, abar: Tensor) -> Tensor:
    """The noise that a prediction implies."""
    match prediction:
        case "epsilon":
            return target_BCHW
        case "v_prediction":
            return abar**0.5 * target_BCHW + (1 - abar) ** 0.5 * x_BCHW
        case "sample":
            return (x_BCHW - abar**0.5 * target_BCHW) / (1 - abar) ** 0.5


def limited(clean_BCHW: Tensor, limit: Limit | None) -> Tensor:
    return clean_BCHW if limit is None else limit(clean_BCHW)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
