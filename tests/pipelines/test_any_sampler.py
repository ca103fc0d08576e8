"""Every sampler with every pipeline; the networks of IF predict their variance, too, whether it is used or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.pipelines.seven import SEVEN, built, told

import floyd

SCHEDULERS = [name for name in floyd.__all__ if name.endswith("Scheduler")]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", SEVEN)
def test_any_scheduler_samples_in_any_pipeline(ours: dict[str, Any], name: str, scheduler: str) -> None:
    plain = built(name, ours)
    other = getattr(floyd, scheduler).from_config(plain.scheduler.config)
    arguments = told(name, 0)
    picture = built(name, ours, scheduler=other)(**arguments).images
    usual = plain(**{**arguments, "generator": told(name, 0)["generator"]}).images
    assert picture.shape == usual.shape
    assert picture.isfinite().all()
    if scheduler == type(plain.scheduler).__name__:
        assert torch.equal(picture, usual)
    else:
        assert not torch.equal(picture, usual)


@pytest.mark.parametrize("name", SEVEN)
def test_the_stochastic_solver_samples_in_any_pipeline(ours: dict[str, Any], name: str) -> None:
    config = ours["three" if name == "StableDiffusionUpscalePipeline" else "one"].scheduler.config
    cls = floyd.DPMSolverMultistepScheduler
    pictures = [
        built(name, ours, scheduler=cls.from_config(config, algorithm_type=kind))(**told(name, 0)).images
        for kind in ("dpmsolver++", "sde-dpmsolver++")
    ]
    assert pictures[1].isfinite().all()
    assert not torch.equal(*pictures)
