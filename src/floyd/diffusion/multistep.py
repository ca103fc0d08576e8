"""Solvers that remember earlier predictions, so that each evaluation of the network goes further.

B images   C channels   H height   W width
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self, get_args

from torch import Tensor

from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Move, Prediction, Remembering, one_of
from floyd.diffusion.schedule import at_least_float32
from floyd.diffusion.solvers import Level, Solver
from floyd.diffusion.timesteps import Step

Rule = Literal["midpoint", "heun"]
Scale = Literal["bh1", "bh2"]


class Past(NamedTuple):
    """An earlier evaluation: where, and the clean picture it saw."""

    level: Level
    clean_BCHW: Tensor


@dataclass(frozen=True, eq=False)
class DPMSolver(Solver, Remembering):
    """DPM-Solver++ 2M, or its stochastic form (arXiv:2211.01095, algorithm 2 and appendix).

    The first step is of first order, and so is a last one that ends clean or, if `lower_order_final`, that of a
    table of less than 15.
    """

    order: int = 2
    rule: Rule = "midpoint"
    is_stochastic: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False
    past: Past | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("rule", self.rule, get_args(Rule))
        _checked_order(self.order)

    def advance(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> tuple[Move, Self]:
        x_BCHW = at_least_float32(x_BCHW)
        now, then = self.level(step.t), self.level(step.t_prev)
        clean_BCHW = self.clean(x_BCHW, pred, step.t)
        past = None if self.order == 1 or self._ends_in_first_order(step) else self.past
        arrived_BCHW = self._arrived(x_BCHW, clean_BCHW, past, now, then)
        if self.is_stochastic:
            fresh = then.spread * math.sqrt(-math.expm1(-2 * (then.log_snr - now.log_snr)))
            arrived_BCHW = arrived_BCHW + fresh * noise(x_BCHW)
        return Move(arrived_BCHW, clean_BCHW), replace(self, past=Past(now, clean_BCHW))

    def _arrived(self, x_BCHW: Tensor, clean_BCHW: Tensor, past: Past | None, now: Level, then: Level) -> Tensor:
        h = then.log_snr - now.log_snr
        if h == 0:
            return x_BCHW
        speed, extra = (2, math.exp(-h)) if self.is_stochastic else (1, 1.0)  # chance forgets twice as fast
        gain = -math.expm1(-speed * h)
        kept = then.spread / now.spread * extra
        arrived_BCHW = kept * x_BCHW + then.alpha * gain * clean_BCHW
        if past is None:
            return arrived_BCHW
        change_BCHW = (clean_BCHW - past.clean_BCHW) * (h / (now.log_snr - past.level.log_snr))
        weight = gain / 2 if self.rule == "midpoint" else 1 - gain / (speed * h)
        return arrived_BCHW + then.alpha * weight * change_BCHW

    def _ends_in_first_order(self, step: Step) -> bool:
        is_short = step.index + 1 < 15  # of the last step, the index tells the length
        return step.is_last and (self.ends_clean or self.euler_at_final or (self.lower_order_final and is_short))


class Arrival(NamedTuple):
    """How the previous move was made, to be corrected now that the network has seen where it ended."""

    x_BCHW: Tensor
    now: Past
    before: Past | None  # of a second-order move


@dataclass(frozen=True, eq=False)
class UniPC(Solver, Remembering):
    """UniPC (arXiv:2302.04867, algorithms 5 to 8): the next prediction also corrects the move that led to it.

    The first step is of first order; so is the last if `lower_order_final`, or if it ends clean: the noise level 0
    is infinitely far away. `uncorrected` are the steps, by index, whose arrival is left as it is.
    """

    order: int = 2
    scale: Scale = "bh2"
    lower_order_final: bool = True
    uncorrected: tuple[int, ...] = ()
    arrival: Arrival | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("scale", self.scale, get_args(Scale))
        _checked_order(self.order)

    def advance(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> tuple[Move, Self]:
        x_BCHW = at_least_float32(x_BCHW)
        here = Past(self.level(step.t), self.clean(x_BCHW, pred, step.t))
        before = None
        if self.arrival is not None:
            before = self.arrival.now
            if step.index - 1 not in self.uncorrected:
                x_BCHW = self._corrected(self.arrival, here)
        if self.order == 1 or (step.is_last and (self.lower_order_final or self.ends_clean)):
            before = None
        arrival = Arrival(x_BCHW, here, before)
        return Move(self._predicted(arrival, self.level(step.t_prev)), here.clean_BCHW), replace(self, arrival=arrival)

    def _predicted(self, arrival: Arrival, then: Level) -> Tensor:
        h = then.log_snr - arrival.now.level.log_snr
        if h == 0:
            return arrival.x_BCHW
        arrived_BCHW = _first_order(arrival, then)
        if arrival.before is None:
            return arrived_BCHW
        return arrived_BCHW - then.alpha * self._weight(h) / 2 * _change(arrival.now, arrival.before, h)[1]

    def _corrected(self, arrival: Arrival, here: Past) -> Tensor:
        then, now = here.level, arrival.now
        h = then.log_snr - now.level.log_snr
        news_BCHW = here.clean_BCHW - now.clean_BCHW
        if arrival.before is None:
            bend_BCHW = news_BCHW / 2
        else:
            ratio, change_BCHW = _change(now, arrival.before, h)
            first = (math.expm1(-h) / -h - 1) / self._weight(h)  # eq. 5 of the paper with p = 2
            second = 2 * ((math.expm1(-h) / -h - 1) / -h - 0.5) / self._weight(h)
            past_share = (first - second) / (1 - ratio)
            bend_BCHW = past_share * change_BCHW + (first - past_share) * news_BCHW
        return _first_order(arrival, then) - then.alpha * self._weight(h) * bend_BCHW

    def _weight(self, h: float) -> float:
        """B(h) of the paper."""
        return -h if self.scale == "bh1" else math.expm1(-h)


def _first_order(arrival: Arrival, then: Level) -> Tensor:
    now = arrival.now.level
    h = then.log_snr - now.log_snr
    kept = then.spread / now.spread
    return kept * arrival.x_BCHW - then.alpha * math.expm1(-h) * arrival.now.clean_BCHW


def _change(now: Past, before: Past, h: float) -> tuple[float, Tensor]:
    """How far back the earlier evaluation lies, in steps of h (negative), and the change per such step."""
    ratio = (before.level.log_snr - now.level.log_snr) / h
    return ratio, (before.clean_BCHW - now.clean_BCHW) / ratio


def _checked_order(order: int) -> None:
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}.")
