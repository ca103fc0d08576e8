"""What the safety checker finds unsafe is hidden in every format and told in plain words; what it could not judge, too.

The watermark is on PIL pictures alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.pipelines.compare import quietly

from floyd.errors import SafetyError
from floyd.models.safety import IFSafetyChecker, SafetyScores
from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.finish import blurred

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


def judge(monkeypatch: pytest.MonkeyPatch, *, nsfw: list[float], watermark: list[float]) -> None:
    """Every checker gives these scores, one for each picture, whatever it sees."""
    scores = SafetyScores(torch.tensor(nsfw), torch.tensor(watermark))
    monkeypatch.setattr(IFSafetyChecker, "scores", lambda self, x: scores)


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
    assert "Picture 1 of 1 looks unsafe" in caplog.text


@pytest.mark.parametrize(
    ("stage", "output_type"), [(stage, kind) for stage in ("one", "two", "three") for kind in ("pil", "np", "pt")]
)
def test_scores_and_decisions_of_both_heads_are_told_in_every_format(
    ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stage: str, output_type: str
) -> None:
    judge(monkeypatch, nsfw=[-3.0, 2.5], watermark=[0.75, -1.0])
    ours[stage].watermarker = None
    count = {"num_images_per_prompt": 2}
    output = paint(arm(ours[stage]), output_type, **(TEXT if stage == "one" else LOW), **count)
    assert output.nsfw_scores == [-3.0, 2.5]
    assert output.watermark_scores == [0.75, -1.0]
    assert output.watermark_detected == [True, False]
    assert (output.nsfw_content_detected if stage == "three" else output.nsfw_detected) == [False, True]
    flat = [np.asarray(image).std() < 0.01 for image in output.images]
    assert flat == [False, True]


def test_latents_are_looked_at_too(ours: dict[str, Any]) -> None:
    plain = paint(ours["three"], "latent", **LOW)
    assert plain.nsfw_scores is None
    fine = paint(arm(ours["three"]), "latent", **LOW)
    assert torch.equal(fine.images, plain.images)
    assert fine.nsfw_content_detected == [False]
    unsafe = paint(arm(ours["three"], nsfw=10.0), "latent", **LOW)
    assert unsafe.nsfw_content_detected == [True]
    assert (unsafe.images == 0).all()
    left = paint(ours["three"], "latent", **LOW, safety="flag")
    assert torch.equal(left.images, plain.images)
    assert left.nsfw_content_detected == [True]


@pytest.mark.parametrize("stage", ["one", "two", "three"])
def test_what_is_done_with_an_unsafe_picture_can_be_chosen(ours: dict[str, Any], stage: str) -> None:
    arguments = TEXT if stage == "one" else LOW
    plain = paint(arm(ours[stage]), "np", **arguments).images
    pipe = arm(ours[stage], nsfw=10.0)

    def painted(safety: str) -> np.ndarray:
        output = paint(pipe, "np", **arguments, safety=safety)
        flags = output.nsfw_content_detected if stage == "three" else output.nsfw_detected
        assert flags == [True]
        assert output.nsfw_scores[0] > 5
        return output.images

    assert (painted("black") == 0).all()
    np.testing.assert_array_equal(painted("flag"), plain)
    blurred = painted("blur")
    assert np.abs(blurred.mean((1, 2)) - plain.mean((1, 2))).max() < 0.1, "the colours remain"
    steps = np.abs(np.diff(blurred, axis=1)).max(), np.abs(np.diff(blurred, axis=2)).max()
    assert max(steps) < 0.15 < np.abs(np.diff(plain, axis=1)).max(), "the lines do not"
    with pytest.raises(SafetyError, match="Picture 1 of 1 looks unsafe") as refused:
        paint(pipe, "np", **arguments, safety="raise")
    assert refused.value.nsfw_scores is not None
    assert refused.value.nsfw_scores[0] > 5


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 3, 33, 70), (1, 3, 3, 2), (1, 3, 1, 1)])
def test_a_blur_keeps_nothing_but_the_colours_of_a_few_fields(shape: tuple[int, ...]) -> None:
    x_BCHW = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 4 - 2
    blur_BCHW = blurred(x_BCHW)
    assert blur_BCHW.shape == x_BCHW.shape
    assert blur_BCHW.abs().max() <= 1
    if shape[-1] > 4:
        scrambled = x_BCHW[..., : shape[2] // 4, : shape[3] // 4].flip(2, 3)
        same = x_BCHW.clone()
        same[..., : shape[2] // 4, : shape[3] // 4] = scrambled
        torch.testing.assert_close(blurred(same), blur_BCHW, atol=0.05, rtol=0)
        assert not torch.allclose(same, x_BCHW)


WARNINGS: list[tuple[str, float, float, list[str]]] = [
    (
        "black",
        2.0,
        -1.0,
        ["Picture 2 of 2", "looks unsafe (score 2.00, threshold 0.5)", "made black", "another prompt"],
    ),
    ("blur", 2.0, -1.0, ["Picture 2 of 2", "unsafe", "It was blurred.", "black, blur, flag or raise"]),
    ("flag", 2.0, -1.0, ["Picture 2 of 2", "unsafe", "left as it is"]),
    ("black", -1.0, 0.6, ["Picture 2 of 2", "somebody's watermark (score 0.60, threshold 0.5)", "left as it is"]),
    ("black", 2.0, 0.6, ["Picture 2 of 2", "unsafe", "and looks as if it bore", "made black"]),
    ("flag", float("nan"), -1.0, ["Picture 2 of 2", "could not be judged", "nan", "made black", "float32"]),
]


@pytest.mark.parametrize(("safety", "nsfw", "watermark", "words"), WARNINGS, ids=range(len(WARNINGS)))
def test_one_warning_per_picture_says_which_why_and_what_was_done(
    ours: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    safety: str,
    nsfw: float,
    watermark: float,
    words: list[str],
) -> None:
    judge(monkeypatch, nsfw=[-1.0, nsfw], watermark=[-1.0, watermark])
    paint(ours["one"], "pt", **TEXT, num_images_per_prompt=2, safety=safety)
    (record,) = [record for record in caplog.records if record.name == "floyd.pipelines.finish"]
    assert record.levelname == "WARNING"
    for word in words:
        assert word in record.getMessage()


@pytest.mark.parametrize("safety", ["black", "blur", "flag", "raise"])
@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("head", ["nsfw", "watermark"])
def test_a_picture_that_got_no_number_is_never_shown(
    ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch, head: str, score: float, safety: str
) -> None:
    scores = {"nsfw": [-5.0, -5.0], "watermark": [-5.0, -5.0]}
    scores[head] = [-5.0, score]
    judge(monkeypatch, **scores)
    arguments = {**TEXT, "num_images_per_prompt": 2, "safety": safety}
    if safety == "raise":
        with pytest.raises(SafetyError, match=r"Picture 2 of 2 could not be judged.*It is not handed out"):
            paint(ours["one"], "np", **arguments)
        return
    output = paint(ours["one"], "np", **arguments)
    assert output.nsfw_detected == [False, True]
    assert output.images[0].std() > 0.05
    assert (output.images[1] == 0).all()


@pytest.mark.parametrize("safety", ["black", "blur", "flag", "raise"])
@pytest.mark.parametrize("broken", ["checker", "extractor", "too few scores"])
def test_a_checker_that_fails_hands_out_nothing(
    ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch, broken: str, safety: str
) -> None:
    pipe = ours["one"]

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the weights are gone")

    if broken == "checker":
        monkeypatch.setattr(IFSafetyChecker, "scores", fail)
    elif broken == "extractor":
        pipe.feature_extractor = fail
    else:
        judge(monkeypatch, nsfw=[-5.0], watermark=[-5.0])
    message = "1 and 1 scores for 2 pictures" if broken == "too few scores" else "RuntimeError: the weights are gone"
    with pytest.raises(SafetyError, match=message):
        paint(pipe, "pt", **TEXT, num_images_per_prompt=2, safety=safety)


def test_a_preview_is_looked_at_in_silence_and_does_not_raise(
    ours: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = arm(ours["one"], nsfw=10.0)
    pipe.watermarker = None
    x_BCHW = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    for safety in ("black", "raise"):
        assert not np.asarray(pipe.preview(x_BCHW, safety)[0]).any()
    assert np.asarray(pipe.preview(x_BCHW, "flag")[0]).any()
    assert caplog.text == ""


def test_what_was_unsafe_when_it_was_small_stays_so_and_is_told_once(
    ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, x_BCHW = ours["one"], torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    judge(monkeypatch, nsfw=[5.0, -5.0], watermark=[-5.0, -5.0])
    before = pipe.finished(x_BCHW)
    judge(monkeypatch, nsfw=[-5.0, -5.0], watermark=[-5.0, -5.0])
    after = pipe.finished(x_BCHW, before=before)
    assert after.nsfw == [True, False]
    assert after.nsfw_scores == [-5.0, -5.0]
    assert (after.picture_BCHW[0] == -1).all()
    assert torch.equal(after.picture_BCHW[1], x_BCHW[1])
    pipe.safety_checker = None
    unchecked = pipe.finished(x_BCHW, before=before)
    assert torch.equal(unchecked.picture_BCHW, after.picture_BCHW)
    assert len(caplog.records) == 1


def test_a_checker_that_comes_with_the_weights_is_on_without_a_word(folders: dict[str, Any]) -> None:
    pipe = DiffusionPipeline.from_pretrained(folders["one"])
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.safety_checker.p_head.bias.fill_(10.0)
    assert paint(pipe, "pt", **TEXT).nsfw_detected == [True]


def test_somebody_elses_watermark_is_told_and_the_picture_left_alone(ours: dict[str, Any]) -> None:
    plain = paint(ours["one"], "np", **TEXT)
    told = paint(arm(ours["one"], watermarked=10.0), "np", **TEXT)
    np.testing.assert_array_equal(told.images, plain.images)
    assert (told.nsfw_detected, told.watermark_detected) == ([False], [True])


def test_only_the_flagged_pictures_are_black(ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    judge(monkeypatch, nsfw=[-5.0, 5.0], watermark=[-5.0, -5.0])
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
