"""The loop. Every pipeline, the trainer's previews and the server run this one.

B images   C channels   H height   W width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Final, NamedTuple

import torch
from torch import Tensor

from floyd.diffusion.canvas import Canvas
from floyd.diffusion.guidance import Predict
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Move, Prediction, Remembering, Sampler
from floyd.diffusion.schedule import at_least_float32
from floyd.diffusion.timesteps import Step


class Verdict(Enum):
    STOP = "stop"


STOP: Final = Verdict.STOP
"""What a callback returns to end the chain early."""

OnStep = Callable[[Step, Tensor, Tensor], Verdict | None]
"""Called after each step with the step, x, and the clean picture x is heading for."""


class Moved(NamedTuple):
    """After a step: where x is, and the clean picture it is heading for."""

    step: Step
    x_BCHW: Tensor
    clean_BCHW: Tensor


@torch.no_grad()
def moves(
    x_BCHW: Tensor, predict: Predict, sampler: Sampler, steps: Iterable[Step], canvas: Canvas, noise: Noise
) -> Iterator[Moved]:
    """From noise to a picture step by step, in float32, for whoever wants to watch."""
    x_BCHW = at_least_float32(x_BCHW)
    for step in steps:
        (x_BCHW, clean_BCHW), sampler = _advanced(sampler, x_BCHW, predict(x_BCHW, step.t), step, noise)
        x_BCHW = canvas.keep(x_BCHW)
        yield Moved(step, x_BCHW, canvas.keep(clean_BCHW))


def denoise(
    x_BCHW: Tensor,
    predict: Predict,
    sampler: Sampler,
    steps: Iterable[Step],
    canvas: Canvas,
    noise: Noise,
    on_step: OnStep | None = None,
) -> Tensor:
    """From noise to a picture, in float32. A chain that `on_step` stops returns the clean picture predicted so far."""
    for moved in moves(x_BCHW, predict, sampler, steps, canvas, noise):
        x_BCHW = moved.x_BCHW
        if on_step is not None and _stops(on_step(*moved)):
            return moved.clean_BCHW
    return at_least_float32(x_BCHW)


def _advanced(sampler: Sampler, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> tuple[Move, Sampler]:
    """The move, and the sampler of the next one: itself, unless it remembers."""
    if isinstance(sampler, Remembering):
        return sampler.advance(x_BCHW, pred, step, noise)
    return sampler.step(x_BCHW, pred, step, noise), sampler


def _stops(verdict: object) -> bool:
    if verdict is not None and verdict is not STOP:
        raise TypeError(f"on_step must return None to go on or STOP to end the chain, got {type(verdict).__name__}.")
    return verdict is STOP
