"""Solvers that step through the noise levels of k-diffusion, where x = clean + sigma * noise.

What a chain holds is scaled to unit variance all the same, x / sqrt(1 + sigma^2), as every room of ours expects it:
what the network reads, what a canvas begins with and what it keeps need no scaling.

B images   C channels   H height   W width
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from itertools import count
from typing import NamedTuple, Self, get_args

from torch import Tensor

from floyd.diffusion.limits import Limit
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Move, Prediction, Remembering, Target, clean_of, limited, one_of
from floyd.diffusion.schedule import NoiseSchedule, at_least_float32
from floyd.diffusion.timesteps import Step


class Level(NamedTuple):
    """One noise level, x = alpha * clean + spread * noise with alpha^2 + spread^2 = 1, in double precision."""

    alpha: float
    spread: float

    @property
    def sigma(self) -> float:
        """The noise where the clean picture has weight 1."""
        return self.spread / self.alpha

    @property
    def log_snr(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, the time of DPM-Solver (arXiv:2206.00927, section 2)."""
        return math.log(self.alpha / self.spread) if self.spread > 0 else math.inf


@dataclass(frozen=True, eq=False)
class Solver:
    """What the solvers share: reading the clean picture off a prediction, and the levels of a step."""

    schedule: NoiseSchedule
    _: KW_ONLY
    prediction: Target = "epsilon"
    limit: Limit | None = None
    ends_clean: bool = True  # False: the last step ends at the first training timestep's noise level

    def __post_init__(self) -> None:
        one_of("prediction", self.prediction, get_args(Target))

    def level(self, t: int) -> Level:
        alpha_bar = self.schedule.alpha_bar(t if self.ends_clean else max(t, 0)).item()
        return Level(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    def clean(self, x_BCHW: Tensor, pred: Prediction, t: int) -> Tensor:
        """The clean picture that the network sees in `x`, kept in range."""
        target_BCHW = at_least_float32(pred.target_BCHW)
        return limited(clean_of(self.prediction, x_BCHW, target_BCHW, self.schedule.alpha_bar(t)), self.limit)


@dataclass(frozen=True, eq=False)
class Euler(Solver):
    """Euler steps in sigma (arXiv:2206.00364, algorithm 1 with one evaluation a step)."""

    def step(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> Move:
        x_BCHW = at_least_float32(x_BCHW)
        now, then = self.level(step.t), self.level(step.t_prev)
        clean_BCHW = self.clean(x_BCHW, pred, step.t)
        slope_BCHW = _slope(x_BCHW, clean_BCHW, now)
        return Move(then.alpha * clean_BCHW + then.spread * slope_BCHW, clean_BCHW)


@dataclass(frozen=True, eq=False)
class EulerAncestral(Solver):
    """Euler steps that go too far down and come back up by fresh noise, drawn for every step."""

    def step(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> Move:
        x_BCHW = at_least_float32(x_BCHW)
        now, then = self.level(step.t), self.level(step.t_prev)
        clean_BCHW = self.clean(x_BCHW, pred, step.t)
        down = then.sigma**2 / now.sigma  # what is left of sigma once the fresh noise is taken off
        up = math.sqrt(max(then.sigma**2 - down**2, 0.0))
        arrived_BCHW = clean_BCHW + down * _slope(x_BCHW, clean_BCHW, now)
        return Move(then.alpha * (arrived_BCHW + up * noise(x_BCHW)), clean_BCHW)


class Attempt(NamedTuple):
    """An Euler step that is yet to be corrected."""

    begin: Level
    clean_BCHW: Tensor
    slope_BCHW: Tensor


@dataclass(frozen=True, eq=False)
class Heun(Solver, Remembering):
    """Heun's method in sigma (arXiv:2206.00364, algorithm 1): an Euler step, corrected by the slope where it arrives.

    A step that stays at its noise level, as `with_corrections` puts in, is the correction of the one before it.
    """

    attempt: Attempt | None = None

    def advance(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> tuple[Move, Self]:
        x_BCHW = at_least_float32(x_BCHW)
        now = self.level(step.t)
        clean_BCHW = self.clean(x_BCHW, pred, step.t)
        slope_BCHW = _slope(x_BCHW, clean_BCHW, now)
        if step.t == step.t_prev:
            if self.attempt is None:
                raise ValueError(f"The step at t={step.t} corrects the step before it, but it is the first.")
            begin, first_BCHW, first_slope_BCHW = self.attempt
            bend_BCHW = (now.sigma - begin.sigma) * (slope_BCHW - first_slope_BCHW) / 2
            x_BCHW = now.alpha * (first_BCHW + bend_BCHW) + now.spread * first_slope_BCHW
            return Move(x_BCHW, clean_BCHW), replace(self, attempt=None)
        then = self.level(step.t_prev)
        arrived_BCHW = then.alpha * clean_BCHW + then.spread * slope_BCHW
        return Move(arrived_BCHW, clean_BCHW), replace(self, attempt=Attempt(now, clean_BCHW, slope_BCHW))


MOST_SIGMA = 200.0  # from which a step is corrected; the linear schedule begins at 157, the cosine one at 20,291


def with_corrections(steps: Iterable[Step], schedule: NoiseSchedule | None = None) -> tuple[Step, ...]:
    """Each step followed by its correction, a step that stays where it is; the last has none: it ends clean.

    Given the schedule, nor has a step from above MOST_SIGMA. It leaves pure noise, and its correction would weigh the
    difference of two predictions with half the ratio of its noise levels, thousands for a cosine schedule.
    """
    index = count()
    moves: list[Step] = []
    for step in steps:
        moves.append(Step(next(index), step.t, step.t_prev))
        is_pure_noise = schedule is not None and float(1 / schedule.alpha_bar(step.t) - 1) > MOST_SIGMA**2
        if not step.is_last and not is_pure_noise:
            moves.append(Step(next(index), step.t_prev, step.t_prev))
    return tuple(moves)


def _slope(x_BCHW: Tensor, clean_BCHW: Tensor, level: Level) -> Tensor:
    """The noise that the clean picture leaves of `x`, d(x / alpha) / d sigma: arXiv:2206.00364, eq. 3, s(t) = 1."""
    return (x_BCHW - level.alpha * clean_BCHW) / level.spread
