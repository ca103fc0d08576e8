"""How several predictions become one.

B images   K all branches' images   C channels   H height   W width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from floyd.diffusion.conditioning import Conditioning, apart
from floyd.diffusion.samplers import Prediction
from floyd.diffusion.schedule import at_least_float32

Predict = Callable[[Tensor, int], Prediction]
Network = Callable[[Tensor, int, Conditioning], Tensor]


@dataclass(frozen=True, eq=False)
class Guidance:
    """target = base + sum of weight * (pull - base), all branches in one forward pass.

    No guidance is no pull. Classifier-free guidance (arXiv:2207.12598, eq. 6) is one pull of weight `scale` away from
    the empty prompt. The original's style mixing is two: scale * (1 - mix) and scale * mix. A learned variance is
    taken from the first pull (from the base if there is none): it is not a direction to exaggerate.

    `times` are the timesteps of training at which it pulls, all if None: a guidance interval (arXiv:2404.07724). At
    others the first pull's conditioning speaks alone, and is the only branch that is run.
    """

    base: Conditioning
    pulls: tuple[tuple[Conditioning, float], ...] = ()
    times: range | None = None

    @classmethod
    def classifier_free(
        cls, text: Conditioning, empty: Conditioning | None, scale: float, times: range | None = None
    ) -> Self:
        """Away from `empty`, towards `text`; a scale of at most 1 asks for no guidance and runs a single branch."""
        if scale <= 1:
            return cls(text)
        if empty is None:
            raise ValueError(f"A guidance scale of {scale} needs the negative prompt's conditioning; got None.")
        return cls(empty, ((text, scale),), times)

    @property
    def num_branches(self) -> int:
        return 1 + len(self.pulls)

    @property
    def branches(self) -> list[Conditioning]:
        return [self.base, *(conditioning for conditioning, _ in self.pulls)]

    @property
    def joined(self) -> Conditioning:
        """Every branch's conditioning as one batch, the base first."""
        return self.base.joined(conditioning for conditioning, _ in self.pulls)

    def apart(self) -> list[Self]:
        """That of each image alone."""
        weights = [weight for _, weight in self.pulls]
        branches = [told.apart() for told in self.branches]
        return [
            type(self)(base, tuple(zip(pulls, weights, strict=True)), self.times)
            for base, *pulls in zip(*branches, strict=True)
        ]

    def over(self, timesteps: Sequence[int], predict_for: Callable[[Self, Sequence[int]], Predict]) -> Predict:
        """A predictor for a way of these timesteps, made of one for those within `times` and one for the others.

        `predict_for` is asked for either, unless it has no steps: a guidance for all times, and its timesteps.
        """
        if self.times is None or not self.pulls:
            return predict_for(self, timesteps)
        times, (text, _) = self.times, self.pulls[0]
        parts = {True: replace(self, times=None), False: type(self)(text)}
        own = {is_within: [t for t in timesteps if (t in times) == is_within] for is_within in parts}
        ways = {is_within: predict_for(part, own[is_within]) for is_within, part in parts.items() if own[is_within]}

        def predict(x_BCHW: Tensor, t: int) -> Prediction:
            return ways[t in times](x_BCHW, t)

        return predict

    def predictor(self, network: Network) -> Predict:
        """The network and all it is told, as a function of the noisy picture and the time alone."""
        joined = self.joined

        def predict(x_BCHW: Tensor, t: int) -> Prediction:
            out_KCHW = network(torch.cat([x_BCHW] * self.num_branches), t, joined)
            return self.combined([split(part, x_BCHW.shape) for part in out_KCHW.chunk(self.num_branches)])

        return predict

    def predictor_apart(self, network_for: Callable[[Conditioning], Network]) -> Predict:
        """The same, but the network sees one image of one branch at a time, told what `network_for` is given once.

        What it says of an image then does not depend on the others, to the last bit.
        """
        images = [(image, [(told, network_for(told)) for told in image.branches]) for image in self.apart()]

        def predict(x_BCHW: Tensor, t: int) -> Prediction:
            predictions = []
            for x_1CHW, (image, branches) in zip(apart(x_BCHW), images, strict=True):
                outs = [network(x_1CHW, t, told) for told, network in branches]
                predictions.append(image.combined([split(out_1CHW, x_1CHW.shape) for out_1CHW in outs]))
            return gathered(predictions)

        return predict

    def combined(self, branches: list[Prediction]) -> Prediction:
        base, *pulls = branches
        target_BCHW = base.target_BCHW
        for pull, (_, weight) in zip(pulls, self.pulls, strict=True):
            target_BCHW = target_BCHW + weight * (pull.target_BCHW - base.target_BCHW)
        return Prediction(target_BCHW, (pulls or [base])[0].variance_BCHW)


def gathered(images: list[Prediction]) -> Prediction:
    """The predictions of single images as that of a batch."""
    targets, variances = zip(*images, strict=True)
    return Prediction(torch.cat(targets), None if variances[0] is None else torch.cat(variances))


def split(out: Tensor, shape_BCHW: torch.Size) -> Prediction:
    """A network's output as target and variance: it has the channels of x, or twice as many."""
    batch, channels, *size = shape_BCHW
    if out.shape not in ((batch, channels, *size), (batch, 2 * channels, *size)):
        raise ValueError(
            f"For x of shape {list(shape_BCHW)} the network must return {channels} channels, or {2 * channels} with a "
            f"variance, at the same size; it returned {list(out.shape)} for a branch."
        )
    target_BCHW, *variance = at_least_float32(out).split(channels, dim=1)
    return Prediction(target_BCHW, variance[0] if variance else None)
