"""The loop. Every pipeline, the trainer's previews and the server run this one.

B images   C channels   H height   W width
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

import torch
from torch import Tensor

from floyd.diffusion.canvas import Canvas
from floyd.diffusion.guidance import Predict
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Sampler, advanced
from floyd.diffusion.schedule import at_least_float32
from floyd.diffusion.timesteps import Step


class Verdict(Enum):
    STOP = "stop"


STOP: Final = Verdict.STOP
"""What a callback returns to end the chain early."""


@dataclass(frozen=True, eq=False)
class Change:
    """What is to be different from the next step on; None leaves it as it is."""

    x_BCHW: Tensor | None = None
    predict: Predict | None = None


OnStep = Callable[[Step, Tensor, Tensor], Verdict | Change | None]
"""Called after each step with the step, x, and the clean picture x is heading for."""


class Moved(NamedTuple):
    """After a step: where x is, and the clean picture it is heading for; of a widened canvas what is handed out."""

    step: Step
    x_BCHW: Tensor
    clean_BCHW: Tensor


@torch.no_grad()
def moves(
    x_BCHW: Tensor, predict: Predict, sampler: Sampler, steps: Iterable[Step], canvas: Canvas, noise: Noise
) -> Generator[Moved, Change | None, Tensor]:
    """From noise to a picture step by step, in float32, for whoever wants to watch; a `Change` may be sent back."""
    x_BCHW = at_least_float32(x_BCHW)
    for step in steps:
        (x_BCHW, clean_BCHW), sampler = advanced(sampler, x_BCHW, predict(x_BCHW, step.t), step, noise)
        x_BCHW = canvas.keep(x_BCHW)
        change = yield Moved(step, canvas.cropped(x_BCHW), canvas.finished(canvas.keep(clean_BCHW)))
        if change is not None:
            if change.x_BCHW is not None:
                x_BCHW = canvas.keep(canvas.with_cropped(x_BCHW, at_least_float32(change.x_BCHW)))
            predict = change.predict or predict
    return canvas.finished(x_BCHW)


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
    chain = moves(x_BCHW, predict, sampler, steps, canvas, noise)
    change: Change | None = None
    while True:
        try:
            moved = chain.send(change)
        except StopIteration as ended:
            painted_BCHW: Tensor = ended.value
            return painted_BCHW
        answer = None if on_step is None else _answer(on_step(*moved))
        if isinstance(answer, Verdict):
            return moved.clean_BCHW
        change = answer


def _answer(answer: object) -> Change | Verdict | None:
    if answer is None or answer is STOP or isinstance(answer, Change):
        return answer
    raise TypeError(
        f"on_step must return None to go on or STOP to end the chain, or a Change, got {type(answer).__name__}."
    )
