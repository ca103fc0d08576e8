"""`batch_invariant=True`: one image, one branch of the guidance and one CPU thread at a time.

How a kernel rounds depends on the shapes it is given and on how many threads share its work. With nothing else in the
batch and nobody to share with, every bit of an image depends on the image alone. The draws are those of any other call.

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from floyd.diffusion.conditioning import Conditioning, apart
from floyd.diffusion.guidance import Guidance, Network, Predict
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Move, Prediction, Remembering, Sampler, advanced
from floyd.diffusion.schedule import NoiseSchedule
from floyd.diffusion.timesteps import Step
from floyd.runtime.threads import one_thread


def steady(is_wanted: bool) -> AbstractContextManager[None]:
    """One CPU thread for the block, if that is wanted."""
    return one_thread() if is_wanted else nullcontext()


def each(work: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """Work that is done image by image."""
    with one_thread():
        return torch.cat([work(x_1CHW) for x_1CHW in apart(x_BCHW)])


def predictor(guidance: Guidance, network_for: Callable[[Conditioning], Network]) -> Predict:
    """`guidance.predictor` that sees images and branches one by one; `network_for` is asked once for each of them."""
    with one_thread():
        predict_apart = guidance.predictor_apart(network_for)

    def predict(x_BCHW: Tensor, t: int) -> Prediction:
        with one_thread():
            return predict_apart(x_BCHW, t)

    return predict


@dataclass(frozen=True, eq=False)
class Apart(Remembering):
    """A sampler that moves one image after the other, each with a memory of its own."""

    samplers: tuple[Sampler, ...]

    @classmethod
    def of(cls, sampler: Sampler, num_images: int) -> Self:
        return cls((sampler,) * num_images)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.samplers[0].schedule

    def advance(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> tuple[Move, Self]:
        rows = zip(self.samplers, apart(x_BCHW), _apart(pred), noise.apart(len(x_BCHW)), strict=True)
        with one_thread():
            moves, samplers = zip(*(advanced(s, x, own, step, draw) for s, x, own, draw in rows), strict=True)
        return Move(*map(torch.cat, zip(*moves, strict=True))), replace(self, samplers=samplers)


def _apart(pred: Prediction) -> list[Prediction]:
    targets = apart(pred.target_BCHW)
    variances = [None] * len(targets) if pred.variance_BCHW is None else apart(pred.variance_BCHW)
    return [Prediction(*row) for row in zip(targets, variances, strict=True)]
