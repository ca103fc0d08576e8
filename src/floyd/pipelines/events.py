"""What a cascade tells while it paints, and what it returns.

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from floyd.pipelines.finish import Finished


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    stage: str  # "stage_1"
    num_steps: int
    width: int  # of the pictures to come, in pixels
    height: int

    @property
    def size(self) -> int:
        """The shorter side."""
        return min(self.width, self.height)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepDone:
    stage: str
    index: int  # from 0
    num_steps: int
    clean_BCHW: Tensor  # what x is heading for: pixels in [-1, 1], or latents in stage III
    preview: Callable[[], list[Image]]  # the same as pictures, looked at by the safety checker; made when called


@dataclass(frozen=True, kw_only=True, eq=False)
class StageDone:
    stage: str
    pictures: list[Image]


@dataclass(frozen=True, kw_only=True, eq=False)
class CascadeResult:
    """Pictures of one prompt."""

    images: list[Image]  # of the last stage
    stages: dict[str, list[Image]]  # of every stage, by name
    seeds: list[int]  # `seed=seeds[i], count=1` paints image i again
    nsfw_detected: list[bool] | None = None  # by any stage's safety checker; None without one
    watermark_detected: list[bool] | None = None
    nsfw_scores: list[float] | None = None  # the highest of any stage, for each image; nan if one was
    watermark_scores: list[float] | None = None
    is_interrupted: bool = False  # `images` are then as far as the painting had come, of the stage it had come to

    @classmethod
    def of(
        cls,
        seeds: Sequence[int],
        pictures: dict[str, list[Image]],
        verdicts: Sequence[Finished],
        *,
        is_interrupted: bool = False,
    ) -> Self:
        """What any stage objects to is told; stages without a checker say nothing."""
        return cls(
            images=pictures[list(pictures)[-1]],
            stages=pictures,
            seeds=list(seeds),
            nsfw_detected=_each(any, [verdict.nsfw for verdict in verdicts]),
            watermark_detected=_each(any, [verdict.watermarked for verdict in verdicts]),
            nsfw_scores=_each(_highest, [verdict.nsfw_scores for verdict in verdicts]),
            watermark_scores=_each(_highest, [verdict.watermark_scores for verdict in verdicts]),
            is_interrupted=is_interrupted,
        )


def _each(combine: Callable[[Sequence[Any]], Any], columns: Sequence[Sequence[Any] | None]) -> list[Any] | None:
    """One value for each image, out of what the stages say of it."""
    told = [column for column in columns if column is not None]
    return [combine(row) for row in zip(*told, strict=True)] if told else None


def _highest(scores: Sequence[float]) -> float:
    return nan if any(isnan(score) for score in scores) else max(scores)


@dataclass(frozen=True, kw_only=True, eq=False)
class Done:
    result: CascadeResult


Event = StageStarted | StepDone | StageDone | Done
