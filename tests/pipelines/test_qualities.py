"""Draft, standard, quality."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from floyd.pipelines.cascade import Cascade, StageStarted
from floyd.pipelines.options import Options, with_defaults
from floyd.pipelines.qualities import QUALITIES, Quality

PRESETS: dict[str, Any] = {
    "stage_1": {"timesteps": [900, 600, 0], "guidance_scale": 3.0},
    "stage_2": {"num_inference_steps": 2, "noise_level": 100},
}


@pytest.fixture
def cascade(ours: dict[str, Any]) -> Cascade:
    return Cascade(*ours.values(), presets=PRESETS)


def parts(stage: Any) -> dict[str, int]:
    return {name: id(part) for name, part in stage.components.items() if name != "scheduler"}


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_quality_changes_samplers_and_steps_and_copies_no_network(cascade: Cascade, quality: Quality) -> None:
    other = cascade.with_quality(quality)
    for name, stage in other.stages.items():
        before, (scheduler, steps) = cascade.stages[name], QUALITIES[quality][name]
        assert parts(stage) == parts(before)
        assert type(stage.scheduler) is scheduler
        assert stage.scheduler.config.beta_schedule == before.scheduler.config.beta_schedule
        assert steps in (other.presets[name].get("timesteps"), other.presets[name].get("num_inference_steps"))
    assert other.presets["stage_1"]["guidance_scale"] == 3.0
    assert other.presets["stage_2"]["noise_level"] == 100
    assert cascade.presets == PRESETS, "the first cascade is as it was"


def evaluations(cascade: Cascade, name: str) -> int:
    """How often a stage asks its network."""
    stage, preset = cascade.stages[name], cascade.presets[name]
    options = {key: preset[key] for key in ("timesteps", "num_inference_steps") if key in preset}
    _, steps = stage.steps_for(Options.of({**with_defaults(stage.__call__, options), "prompt": ""}))
    return len(steps)


def test_each_quality_asks_the_networks_more_often_than_the_one_before(cascade: Cascade) -> None:
    for name in cascade.stages:
        draft, standard, quality = (evaluations(cascade.with_quality(each), name) for each in QUALITIES)
        assert draft < standard < quality


def test_a_quality_paints_another_picture(cascade: Cascade) -> None:
    plain, draft = (each("a red circle", size=32).images[0] for each in (cascade, cascade.with_quality("draft")))
    assert not np.array_equal(np.asarray(draft), np.asarray(plain))


def test_what_a_call_says_is_stronger(cascade: Cascade) -> None:
    started = next(iter(cascade.with_quality("standard").run("a red circle", size=32, steps=4)))
    assert isinstance(started, StageStarted)
    assert started.num_steps == 4


def test_a_quality_that_there_is_not_is_refused(cascade: Cascade) -> None:
    with pytest.raises(ValueError, match="must be one of draft, standard, quality, got 'best'"):
        cascade.with_quality("best")  # type: ignore[arg-type]
