from __future__ import annotations

import pytest

from floyd.apps.settings import Settings

STAGES = ("stage_1", "stage_2", "stage_3")


def test_nothing_said_is_nothing_told() -> None:
    assert Settings.parsed().options(STAGES) == {stage: {} for stage in STAGES}


def test_one_value_is_for_every_stage() -> None:
    options = Settings.parsed(steps="7", guidance="2.5").options(STAGES)
    assert options == {stage: {"num_inference_steps": 7, "guidance_scale": 2.5} for stage in STAGES}


def test_several_values_are_for_a_stage_each_and_a_name_is_a_table() -> None:
    options = Settings.parsed(steps="fast27, 20,12", guidance="5,1,1").options(STAGES)
    assert options["stage_1"] == {"timesteps": "fast27", "guidance_scale": 5.0}
    assert options["stage_2"] == {"num_inference_steps": 20, "guidance_scale": 1.0}
    assert options["stage_3"] == {"num_inference_steps": 12, "guidance_scale": 1.0}


def test_an_interval_is_two_timesteps() -> None:
    options = Settings.parsed(guidance_interval="200-800, 0-1000").options(STAGES[:2])
    assert options == {"stage_1": {"guidance_interval": (200, 800)}, "stage_2": {"guidance_interval": (0, 1000)}}


@pytest.mark.parametrize("text", ["", "200", "200-", "-1-5", "200-800-900", "a-b", "0.2-0.8"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="guidance_interval must be two timesteps as in 200-800"):
        Settings.parsed(guidance_interval=text)


@pytest.mark.parametrize("told", [True, False])
def test_colours_are_kept_by_stages_that_enlarge(told: bool) -> None:
    wanted = {"stage_1": {}, "stage_2": {"color_fix": told}, "stage_3": {"color_fix": told}}
    assert Settings.parsed(color_fix=told).options(STAGES) == wanted


def test_values_for_stages_that_do_not_run_are_left_over() -> None:
    assert Settings.parsed(steps="50,20,12").options(STAGES[:1]) == {"stage_1": {"num_inference_steps": 50}}


@pytest.mark.parametrize(
    ("steps", "guidance", "message"),
    [
        ("", None, "steps must be a number"),
        ("5,,7", None, "steps must be a number"),
        ("2.5", None, "got '2.5'"),
        (None, "five", "guidance must be a number"),
        ("1,2,3,4", None, "at most 3 values"),
    ],
)
def test_what_is_no_list_of_values_is_refused(steps: str | None, guidance: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.parsed(steps=steps, guidance=guidance)


def test_too_few_values_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"guidance must be one value, or 3, for stage_1, stage_2, stage_3; got 5\.0,1\.0"
    ):
        Settings.parsed(guidance="5,1").options(STAGES)
