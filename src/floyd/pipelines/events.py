"""What a cascade tells while it paints, and what it returns.

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    stage: str  # "stage_1"
    num_steps: int
    size: int  # of the pictures to come, in pixels


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Done:
    result: CascadeResult


Event = StageStarted | StepDone | StageDone | Done
