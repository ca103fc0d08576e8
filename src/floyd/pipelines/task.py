"""A call as data: what is to be painted, once all of it is checked, and the chain of steps that paints it.

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from floyd.diffusion.canvas import Canvas
from floyd.diffusion.conditioning import low_res_condition
from floyd.diffusion.engine import Moved, OnStep, denoise, moves
from floyd.diffusion.guidance import Predict
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Sampler
from floyd.diffusion.schedule import NoiseSchedule
from floyd.diffusion.timesteps import Step
from floyd.pipelines.keeping import Kept
from floyd.pipelines.options import Options
from floyd.runtime.clock import in_part, part
from floyd.text.prompts import PromptPair


@dataclass(frozen=True, eq=False)
class LowRes:
    """A super-resolution stage's input: the previous stage's picture, one for each image, and how much to noise it."""

    picture_BCHW: Tensor
    level: int
    schedule: NoiseSchedule
    keeps_colors: bool = False  # in large areas of the result


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One call: all of it checked, the text read, nothing painted."""

    options: Options
    text: PromptPair
    canvas: Canvas
    steps: tuple[Step, ...]
    sampler: Sampler
    low_res: LowRes | None = None
    start_BCHW: Tensor | None = None  # instead of a draw
    kept: Kept | None = None  # what an inpainting was given, to be put back

    @property
    def colors(self) -> Tensor | None:
        """The small picture whose colours the result is to have."""
        return self.low_res.picture_BCHW if self.low_res is not None and self.low_res.keeps_colors else None


@dataclass(frozen=True, eq=False)
class Chain:
    """Everything that `denoise` is handed."""

    x_BCHW: Tensor
    predict: Predict
    sampler: Sampler
    steps: tuple[Step, ...]
    canvas: Canvas
    noise: Noise
    predict_for: Callable[[PromptPair], Predict]  # the same network, told another text

    def run(self, on_step: OnStep | None = None) -> Tensor:
        on_step = on_step and in_part("callbacks")(on_step)
        with part("sampler", count=0):
            return denoise(self.x_BCHW, self.predict, self.sampler, self.steps, self.canvas, self.noise, on_step)

    def moves(self) -> Iterator[Moved]:
        """The same, one step at a time, for whoever wants to watch or to stop."""
        with part("sampler", count=0):
            for moved in moves(self.x_BCHW, self.predict, self.sampler, self.steps, self.canvas, self.noise):
                yield moved._replace(x_BCHW=self.canvas.blended(moved.x_BCHW)) if moved.step.is_last else moved


def first(task: Task, noise: Noise) -> Tensor:
    if task.start_BCHW is not None:
        return task.start_BCHW
    return task.canvas.first(task.sampler.schedule, task.steps[0].t, noise)


def low_res(task: Task, noise: Noise) -> tuple[Tensor, Tensor] | tuple[()]:
    if task.low_res is None:
        return ()
    given, canvas = task.low_res, task.canvas
    return low_res_condition(
        given.picture_BCHW, canvas.sides, given.level, given.schedule, noise, extended=canvas.extended
    )
