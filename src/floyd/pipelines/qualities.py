"""Draft, standard and quality: with which sampler, in how many steps. docs/speed.md has the measurements."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from floyd.pipelines.painter import Painter
from floyd.schedulers.base import Scheduler
from floyd.schedulers.ddim import DDIMScheduler
from floyd.schedulers.ddpm import DDPMScheduler
from floyd.schedulers.euler import EulerAncestralDiscreteScheduler

Quality = Literal["draft", "standard", "quality"]


class Sampling(NamedTuple):
    """How a stage is sampled."""

    scheduler: type[Scheduler]
    steps: int | str  # evenly spaced, or a respacing string


QUALITIES: Mapping[Quality, Mapping[str, Sampling]] = MappingProxyType(
    {
        "draft": {
            "stage_1": Sampling(EulerAncestralDiscreteScheduler, 10),
            "stage_2": Sampling(EulerAncestralDiscreteScheduler, 10),
            "stage_3": Sampling(DDIMScheduler, 8),
        },
        "standard": {
            "stage_1": Sampling(EulerAncestralDiscreteScheduler, 25),
            "stage_2": Sampling(DDPMScheduler, "smart27"),
            "stage_3": Sampling(DDIMScheduler, 20),
        },
        "quality": {
            "stage_1": Sampling(EulerAncestralDiscreteScheduler, 50),
            "stage_2": Sampling(DDPMScheduler, 50),
            "stage_3": Sampling(DDIMScheduler, 75),
        },
    }
)


def checked(quality: Any) -> Quality:
    if quality not in QUALITIES:
        raise ValueError(f"quality must be one of {', '.join(get_args(Quality))}, got {quality!r}.")
    known: Quality = quality
    return known


def sampled(name: str, stage: Painter, preset: Mapping[str, Any], quality: Quality) -> tuple[Painter, dict[str, Any]]:
    """A stage over the same components but for its sampler, and its preset with other steps."""
    scheduler, steps = QUALITIES[quality][name]
    other = stage.from_pipe(stage, scheduler=scheduler.from_config(stage.scheduler.config))
    rest = {key: value for key, value in preset.items() if key not in ("timesteps", "num_inference_steps")}
    return other, {**rest, "num_inference_steps" if isinstance(steps, int) else "timesteps": steps}
