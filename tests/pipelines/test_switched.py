"""Each switch, alone and with all others, against the incumbent: the promise does not depend on what is on."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from tests import tiny
from tests.pipelines.compare import assert_same, quietly

from floyd.runtime.switches import Switches

POSITIVE, NEGATIVE = tiny.embeds()
TEXT: dict[str, Any] = {"prompt_embeds": POSITIVE, "negative_prompt_embeds": NEGATIVE}
LOW: dict[str, Any] = {**TEXT, "image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1}
STAGES = {"one": TEXT, "two": LOW, "three": LOW}
ALONE = {f.name: Switches(**{"read_once": True, f.name: True}) for f in fields(Switches) if f.name != "compiled"}
EVERY: dict[str, Switches] = {"off": Switches.off(), **ALONE, "on": Switches.on(), "best": Switches.best_for("cpu")}


def paint(pipe: Any, stage: str) -> torch.Tensor:
    shared = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    picture: torch.Tensor = torch.as_tensor(pipe(**STAGES[stage], **shared).images)
    return picture


@pytest.fixture(scope="module")
def wanted(theirs: dict[str, Any]) -> dict[str, torch.Tensor]:
    with quietly():
        return {stage: paint(theirs[stage], stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("switch", EVERY)
def test_every_switch_paints_what_the_incumbent_paints(
    ours: dict[str, Any], wanted: dict[str, torch.Tensor], stage: str, switch: str
) -> None:
    ours[stage].switches = EVERY[switch]
    assert_same(paint(ours[stage], stage), wanted[stage])


def test_nothing_is_switched_off_for_the_tests(ours: dict[str, Any], request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--switches") is not None:
        pytest.skip("--switches says otherwise")
    assert all(pipe.switches == Switches.best_for("cpu") for pipe in ours.values())
