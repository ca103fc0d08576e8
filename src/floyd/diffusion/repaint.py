"""RePaint: inpainting whose kept region is noised like the rest (arXiv:2201.09865, algorithm 1).

A canvas keeps the clean picture at every noise level, which a network has never seen beside noise: what it paints may
not fit. Here the network sees the kept region as noisy as the rest, and every move is made several times: the picture
goes back up to the noise level that it came from, and down again, so that both regions get to know each other.

B images   C channels   H height   W width
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Self

from torch import Tensor

from floyd.diffusion.canvas import Canvas
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Implicit, Move, Prediction, Remembering, Sampler, advanced
from floyd.diffusion.schedule import NoiseSchedule
from floyd.diffusion.timesteps import Step

MAX_RESAMPLES = 100


@dataclass(frozen=True, slots=True)
class Return(Step):
    """A move after which the picture goes back up, to be moved again."""

    back_to: int


class NoisedCanvas(Canvas):
    """A canvas that leaves its kept region to `Repaint`: noised like the rest until the end."""

    @classmethod
    def of(cls, canvas: Canvas) -> Self:
        if canvas.mask_B1HW is None:
            raise ValueError("There is nothing to keep on a canvas without a mask, so nothing to resample either.")
        return cls(**{field.name: getattr(canvas, field.name) for field in fields(canvas)})

    def first(self, schedule: NoiseSchedule, t: int, noise: Noise) -> Tensor:
        return schedule.noised(self.picture_BCHW, noise(self.picture_BCHW), t)

    def keep(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW


@dataclass(frozen=True, eq=False)
class Repaint(Remembering):
    """A sampler that puts the kept region, noised, back in after every move, and goes back up where a step says so.

    Draws: those of the sampler itself, then one for the kept region (but for the last move, which ends clean), then one
    for going back up. A sampler that remembers forgets what it saw before it went back.
    """

    sampler: Sampler
    canvas: Canvas  # picture and mask
    fresh: Sampler | None = None  # the sampler as it began

    @property
    def schedule(self) -> NoiseSchedule:
        return self.sampler.schedule

    def advance(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> tuple[Move, Self]:
        fresh = self.fresh or self.sampler
        (x_BCHW, clean_BCHW), after = advanced(self.sampler, x_BCHW, pred, step, noise)
        picture_BCHW = kept_BCHW = self.canvas.picture_BCHW.to(x_BCHW)
        if not step.is_last:
            kept_BCHW = self.schedule.noised(picture_BCHW, noise(x_BCHW), step.t_prev)
        x_BCHW = self.canvas.mixed(kept_BCHW, x_BCHW)
        if isinstance(step, Return):
            x_BCHW, after = _noised_again(x_BCHW, step, self.schedule, noise), fresh
        return Move(x_BCHW, self.canvas.mixed(picture_BCHW, clean_BCHW)), replace(self, sampler=after, fresh=fresh)


def repainting(sampler: Sampler, canvas: Canvas) -> Sampler:
    """What paints on this canvas: `Repaint` where the kept region is to be noised, otherwise the sampler itself."""
    return Repaint(sampler, canvas) if isinstance(canvas, NoisedCanvas) else sampler


def by_the_table(sampler: Sampler) -> Sampler:
    """The sampler, made to go from entry to entry of the table: where it arrives, there the kept region must be."""
    return replace(sampler, stride=None) if isinstance(sampler, Implicit) else sampler


def resampled(steps: Iterable[Step], times: int) -> tuple[Step, ...]:
    """Every move `times` times, each but the last time with a return; the move to the clean picture is made once."""
    if isinstance(times, bool) or not isinstance(times, int) or not 1 <= times <= MAX_RESAMPLES:
        raise ValueError(f"resamples must be an int in [1, {MAX_RESAMPLES}], got {times!r}.")
    moves: list[list[Step]] = []
    for step in steps:
        if step.t == step.t_prev and moves:  # Heun's correction belongs to the move before it
            moves[-1].append(step)
        else:
            moves.append([step])
    table: list[Step] = []
    for *begin, end in moves:
        again = [*begin, Return(end.index, end.t, end.t_prev, back_to=(begin[0] if begin else end).t)]
        table += [*(again * (0 if end.is_last else times - 1)), *begin, end]
    return tuple(table)


def _noised_again(x_BCHW: Tensor, step: Return, schedule: NoiseSchedule, noise: Noise) -> Tensor:
    """From the noise level where a move arrived to the one where it began: q(x_t | x_t_prev), DDPM, eq. 2."""
    kept = schedule.alpha_bar(step.back_to) / schedule.alpha_bar(step.t_prev)
    return kept**0.5 * x_BCHW + (1 - kept) ** 0.5 * noise(x_BCHW)
