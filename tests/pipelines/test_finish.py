"""What the safety checker flags is black in every format; the watermark is on pictures alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.pipelines.compare import quietly

from floyd.models.safety import IFSafetyChecker

POSITIVE, NEGATIVE = tiny.embeds()
TEXT: dict[str, Any] = {"prompt_embeds": POSITIVE, "negative_prompt_embeds": NEGATIVE, "num_inference_steps": 1}
LOW: dict[str, Any] = {**TEXT, "image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1}


def checker(**biases: float) -> IFSafetyChecker:
    theirs = tiny.safety_checker(**biases)
    ours = IFSafetyChecker.from_config(theirs.config.to_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours.eval()


def arm(pipe: Any, **biases: float) -> Any:
    pipe.safety_checker = checker(**biases)
    pipe.feature_extractor = pipe.feature_extractor or tiny.feature_extractor()
    return pipe


def paint(pipe: Any, output_type: str, **arguments: Any) -> Any:
    return pipe(generator=torch.Generator().manual_seed(0), output_type=output_type, **arguments)


@pytest.mark.parametrize(("stage", "output_type", "black"), [
    ("one", "pil", 0), ("one", "np", 0), ("one", "pt", -1),
    ("two", "np", 0), ("three", "pil", 0), ("three", "np", 0), ("three", "pt", 0),
])  # fmt: skip
def test_an_unsafe_picture_is_black_in_every_stage_and_format(
    ours: dict[str, Any], caplog: pytest.LogCaptureFixture, stage: str, output_type: str, black: float
) -> None:
    pipe = arm(ours[stage], nsfw=10.0)
    pipe.watermarker = None
    output = paint(pipe, output_type, **(TEXT if stage == "one" else LOW))
    pictures = np.stack([np.asarray(image) for image in output.images])
    assert (pictures == black).all()
    flags = output.nsfw_content_detected if stage == "three" else output.nsfw_detected
    assert flags == [True]
    assert "1 of 1 pictures look unsafe" in caplog.text


def test_somebody_elses_watermark_is_told_and_the_picture_left_alone(ours: dict[str, Any]) -> None:
    plain = paint(ours["one"], "np", **TEXT)
    told = paint(arm(ours["one"], watermarked=10.0), "np", **TEXT)
    np.testing.assert_array_equal(told.images, plain.images)
    assert (told.nsfw_detected, told.watermark_detected) == ([False], [True])


def test_only_the_flagged_pictures_are_black(ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from floyd.models.safety import SafetyScores

    verdict = SafetyScores(torch.tensor([-5.0, 5.0]), torch.tensor([-5.0, -5.0]))
    monkeypatch.setattr(IFSafetyChecker, "scores", lambda self, x: verdict)
    output = paint(ours["one"], "np", **TEXT, num_images_per_prompt=2)
    assert output.nsfw_detected == [False, True]
    assert output.images[0].std() > 0.05
    assert (output.images[1] == 0).all()


def test_what_is_flagged_agrees_with_the_incumbent(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    from diffusers import IFPipeline

    flagged = {**theirs["one"].components, "safety_checker": tiny.safety_checker(nsfw=10.0)}
    other = IFPipeline(**flagged, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with quietly():
        theirs_out = paint(other, "np", **TEXT)
    ours_out = paint(arm(ours["one"], nsfw=10.0), "np", **TEXT)
    assert ours_out.nsfw_detected == theirs_out.nsfw_detected
    np.testing.assert_array_equal(ours_out.images, theirs_out.images)


def test_without_a_checker_nothing_is_claimed(ours: dict[str, Any]) -> None:
    ours["one"].safety_checker = None
    output = paint(ours["one"], "np", **TEXT)
    assert output.nsfw_detected is None
    assert output.watermark_detected is None


def test_the_watermark_is_drawn_on_pictures_alone(ours: dict[str, Any]) -> None:
    pipe = ours["two"]
    array = paint(pipe, "np", **LOW).images
    marked = np.asarray(paint(pipe, "pil", **LOW).images[0])
    pipe.watermarker = None
    plain = np.asarray(paint(pipe, "pil", **LOW).images[0])
    np.testing.assert_array_equal((array[0] * 255).round().astype(np.uint8), plain)
    rows, columns = np.nonzero((marked != plain).any(-1))
    side = tiny.STAGE_TWO_SIDE
    assert len(rows) > 0
    assert rows.min() > side * 0.8
    assert columns.min() > side * 0.8


def test_stage_three_draws_the_watermark_of_stage_one(ours: dict[str, Any]) -> None:
    plain = np.asarray(paint(ours["three"], "pil", **LOW).images[0])
    ours["three"].watermarker = ours["one"].watermarker
    marked = np.asarray(paint(ours["three"], "pil", **LOW).images[0])
    assert (marked != plain).any()


def test_a_missing_checker_is_a_warning_and_a_missing_extractor_an_error(
    ours: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    kind, components = type(ours["one"]), ours["one"].components
    kind(**{**components, "safety_checker": None})
    assert "unfiltered" in caplog.text
    caplog.clear()
    kind(**{**components, "safety_checker": None}, requires_safety_checker=False)
    assert caplog.text == ""
    with pytest.raises(ValueError, match="no feature_extractor"):
        kind(**{**components, "feature_extractor": None})


def test_a_network_of_stage_one_in_stage_two_is_a_warning(
    ours: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    type(ours["two"])(**{**ours["two"].components, "unet": ours["one"].unet})
    assert "6 input channels; this one has 3" in caplog.text
