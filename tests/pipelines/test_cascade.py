"""One call from a prompt to all three sizes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from floyd.errors import CheckpointError, ConfigError, SafetyError
from floyd.pipelines.cascade import Cascade
from floyd.pipelines.events import Done, StageDone, StageStarted, StepDone
from floyd.pipelines.run import stage_seed
from floyd.pipelines.sizing import Workload
from floyd.runtime.placement import OneAtATime

PROMPT = "a red circle"
PRESETS: dict[str, Any] = {
    "stage_1": {"timesteps": [900, 600, 0], "guidance_scale": 3.0},
    "stage_2": {"num_inference_steps": 2, "noise_level": 100},
    "stage_3": {"num_inference_steps": 1},
}


@pytest.fixture(scope="module")
def root(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages in the built-in checkpoint's layout."""
    root = tmp_path_factory.mktemp("cascade")
    for name, folder in zip(("stage_1", "stage_2", "stage_3"), folders.values(), strict=True):
        (root / name).symlink_to(folder, target_is_directory=True)
    (root / "floyd.json").write_text(json.dumps(PRESETS))
    return root


@pytest.fixture(scope="module")
def from_disk(root: Path) -> Cascade:
    return Cascade.from_pretrained(root)


@pytest.fixture
def cascade(ours: dict[str, Any]) -> Cascade:
    return Cascade(*ours.values(), presets=PRESETS)


def pixels(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_a_folder_of_stages_is_read_with_its_presets(from_disk: Cascade) -> None:
    assert from_disk.sizes == {"stage_1": 32, "stage_2": 48, "stage_3": 192}
    assert from_disk.presets == PRESETS
    stages = list(from_disk.stages.values())
    assert stages[1].text_encoder is None
    for name in ("safety_checker", "feature_extractor", "watermarker"):
        assert getattr(stages[0], name) is getattr(stages[1], name) is getattr(stages[2], name)
        assert getattr(stages[0], name) is not None


def test_pipelines_folders_are_a_cascade_too(folders: dict[str, Path]) -> None:
    cascade = Cascade.from_pretrained(folders["one"], folders["two"], torch_dtype=torch.bfloat16)
    assert cascade.sizes == {"stage_1": 32, "stage_2": 48}
    assert cascade.presets == {}
    assert cascade.stages["stage_2"].unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("up_to", "num_stages"),
    [
        (32, 1),
        (48, 2),
        (192, 3),
        (None, 3),
        ((32, 24), 1),
        ((64, 40), 2),
        (33, 3),
        ((32,), 3),
        ("32", 3),
        (("a", 1), 3),
    ],
)
def test_no_stage_is_loaded_that_the_size_does_not_need(root: Path, up_to: Any, num_stages: int) -> None:
    cascade = Cascade.from_pretrained(root, up_to=up_to)
    assert list(cascade.stages) == ["stage_1", "stage_2", "stage_3"][:num_stages]
    assert list(cascade.presets) == [name for name in PRESETS if name in cascade.stages]


@pytest.mark.parametrize("memory", [None, "8GB"])
def test_what_is_not_needed_is_not_looked_for(folders: dict[str, Path], from_disk: Cascade, memory: str | None) -> None:
    cascade = Cascade.from_pretrained(folders["one"], "no/such", "nor/this", presets=PRESETS, up_to=32, memory=memory)
    np.testing.assert_array_equal(pixels(cascade(PROMPT, size=32).images), pixels(from_disk(PROMPT, size=32).images))
    with pytest.raises(ValueError, match="size must be one of 32"):
        cascade(PROMPT, size=48)


@pytest.mark.parametrize(
    ("up_to", "memory_for", "stages"),
    [
        (32, None, {"stage_1"}),
        (48, Workload(count=2), {"stage_1", "stage_2"}),
        (48, Workload(size=32), {"stage_1"}),
        (None, None, {"stage_1", "stage_2", "stage_3"}),
    ],
)
def test_a_plan_is_for_the_stages_that_are_loaded(
    root: Path, up_to: int | None, memory_for: Workload | None, stages: set[str]
) -> None:
    cascade = Cascade.from_pretrained(root, memory="8GB", memory_for=memory_for, up_to=up_to)
    assert cascade.memory is not None
    assert {choice.part.partition(".")[0] for choice in cascade.memory.plan.choices} == stages
    assert cascade.memory.sizing.workload.count == (1 if memory_for is None else memory_for.count)


def test_a_plan_may_speak_of_stages_that_are_not_loaded(root: Path, from_disk: Cascade) -> None:
    cascade = Cascade.from_pretrained(root, memory="8GB", memory_for=Workload(size=32), up_to=32)
    assert list(cascade.stages) == ["stage_1"]
    np.testing.assert_array_equal(pixels(cascade(PROMPT, size=32).images), pixels(from_disk(PROMPT, size=32).images))


def test_given_components_reach_the_stages_that_use_them(root: Path, ours: dict[str, Any]) -> None:
    encoder = ours["one"].text_encoder
    given = {"safety_checker": None, "requires_safety_checker": False, "text_encoder": encoder}
    cascade = Cascade.from_pretrained(root, **given)
    stages = list(cascade.stages.values())
    assert [stage.safety_checker for stage in stages] == [None, None, None]
    assert stages[0].text_encoder is encoder
    assert stages[1].text_encoder is None
    assert type(stages[2].text_encoder).__name__ == "CLIPTextModel"
    with pytest.raises(TypeError, match="unet belongs to a single stage"):
        Cascade.from_pretrained(root, unet=None)


def test_every_step_is_told_in_order(cascade: Cascade) -> None:
    events = list(cascade.run(PROMPT))
    kinds = [(type(event), getattr(event, "stage", None)) for event in events]
    expected = []
    for stage, steps in (("stage_1", 3), ("stage_2", 2), ("stage_3", 1)):
        expected += [(StageStarted, stage), *[(StepDone, stage)] * steps, (StageDone, stage)]
    assert kinds == [*expected, (Done, None)]
    started = [(e.num_steps, e.size) for e in events if isinstance(e, StageStarted)]
    assert started == [(3, 32), (2, 48), (1, 192)]
    assert [e.index for e in events if isinstance(e, StepDone)] == [0, 1, 2, 0, 1, 0]
    result = events[-1].result
    assert {name: images[0].size for name, images in result.stages.items()} == {
        "stage_1": (32, 32), "stage_2": (48, 48), "stage_3": (192, 192),
    }  # fmt: skip
    assert result.images == result.stages["stage_3"]
    assert (result.seeds, result.nsfw_detected) == ([0], [False])


def test_a_preview_is_the_clean_picture_so_far(cascade: Cascade) -> None:
    *_, last_step, done, _ = cascade.run(PROMPT, size=32)
    assert isinstance(last_step, StepDone)
    assert isinstance(done, StageDone)
    np.testing.assert_array_equal(pixels(last_step.preview()), pixels(done.pictures))
    latent = next(e for e in cascade.run(PROMPT) if isinstance(e, StepDone) and e.stage == "stage_3")
    assert latent.preview()[0].size == (192, 192)


def test_an_image_depends_on_its_own_seed_alone(cascade: Cascade) -> None:
    many = cascade(PROMPT, size=48, seed=5, count=2)
    assert many.seeds == [5, 6]
    assert np.abs(pixels(many.images)[0] - pixels(many.images)[1]).max() > 20
    one = cascade(PROMPT, size=48, seed=6)
    assert np.abs(pixels(one.images)[0] - pixels(many.images)[1]).max() <= 2


def test_the_chain_is_what_the_pipelines_paint_by_hand(cascade: Cascade, ours: dict[str, Any]) -> None:
    positive, negative = ours["one"].encode_prompt("a cat", clean_caption=True, negative_prompt="a dog")
    text = {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def seeded(stage: str) -> torch.Generator:
        return torch.Generator().manual_seed(stage_seed(3, stage))

    first = ours["one"](
        **text, generator=seeded("stage_1"), output_type="pt", timesteps=[900, 600, 0], guidance_scale=3.0
    )
    second = ours["two"](
        image=first.images,
        **text,
        generator=seeded("stage_2"),
        num_inference_steps=2,
        noise_level=100,
        output_type="pt",
    )
    third = ours["three"](
        "a cat", second.images, 1, negative_prompt="a dog", generator=seeded("stage_3"), output_type="pil"
    )
    result = cascade("a cat", negative_prompt="a dog", seed=3)
    np.testing.assert_array_equal(pixels(result.images), pixels(third.images))


def test_the_caller_is_stronger_than_the_presets(cascade: Cascade) -> None:
    def steps(**told: Any) -> list[int]:
        return [e.num_steps for e in cascade.run(PROMPT, **told) if isinstance(e, StageStarted)]

    assert steps(steps=1) == [1, 1, 1]
    assert steps(steps=(2, None, None)) == [2, 2, 1]
    assert steps(steps=("3", 1), size=48) == [3, 1]
    assert steps(options={"stage_1": {"timesteps": [500, 0]}}, size=32) == [2]


def test_one_size_runs_through_all_stages(cascade: Cascade) -> None:
    """The last picture's; the stages of this cascade paint 32, 48 and 192 px by themselves."""
    events = list(cascade.run(PROMPT, size=(284, 196)))
    started = [(e.width, e.height, e.size) for e in events if isinstance(e, StageStarted)]
    assert started == [(47, 33, 33), (71, 49, 49), (284, 196, 196)]
    result = events[-1].result
    assert [images[0].size for images in result.stages.values()] == [(47, 33), (71, 49), (284, 196)]
    previews = [e.preview()[0].size for e in events if isinstance(e, StepDone)]
    assert previews == [(47, 33)] * 3 + [(71, 49)] * 2 + [(284, 196)]

    two = cascade(PROMPT, size=(71, 49))
    np.testing.assert_array_equal(pixels(two.images), pixels(result.stages["stage_2"]))
    assert cascade.sizes_for((33, 20)) == {"stage_1": (33, 20)}


def test_a_square_by_its_sides_is_the_same_as_by_one_number(cascade: Cascade) -> None:
    by_number, by_sides = cascade(PROMPT, size=48), cascade(PROMPT, size=(48, 48))
    np.testing.assert_array_equal(pixels(by_number.images), pixels(by_sides.images))


def test_stages_and_seeds_do_not_share_their_noise() -> None:
    seeds = [stage_seed(seed, stage) for seed in range(100) for stage in ("stage_1", "stage_2", "stage_3")]
    assert len(set(seeds)) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_text_encoder_is_freed_and_comes_back(root: Path) -> None:
    cascade = Cascade.from_pretrained(root)
    first = cascade(PROMPT, size=32, free_text_encoder=True)
    assert cascade.stages["stage_1"].text_encoder is None
    again = cascade(PROMPT, size=32)
    assert cascade.stages["stage_1"].text_encoder is not None
    np.testing.assert_array_equal(pixels(first.images), pixels(again.images))


def test_a_freed_text_encoder_that_nobody_can_load_is_missed(cascade: Cascade) -> None:
    cascade(PROMPT, size=32, free_text_encoder=True)
    with pytest.raises(ValueError, match="no text encoder"):
        cascade.run(PROMPT)


def test_whoever_leaves_in_the_middle_leaves_no_trace(cascade: Cascade) -> None:
    for stage in cascade.stages.values():
        stage._place(OneAtATime(torch.device("cpu")))
    events = cascade.run(PROMPT)
    for event in events:
        if isinstance(event, StepDone):
            break
    events.close()  # type: ignore[attr-defined]
    assert next(events, None) is None
    assert cascade(PROMPT, size=32).images


def test_an_unsafe_picture_is_black_in_all_stages(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    from floyd.models.safety import IFSafetyChecker, SafetyScores

    verdict = SafetyScores(torch.tensor([5.0]), torch.tensor([-5.0]))
    monkeypatch.setattr(IFSafetyChecker, "scores", lambda self, x: verdict)
    for stage in cascade.stages.values():
        stage.watermarker = None
    previews, events = [], []
    for event in cascade.run(PROMPT, size=48):
        events.append(event)
        if isinstance(event, StepDone):
            previews.append(event.preview())
    result = events[-1].result
    assert result.nsfw_detected == [True]
    for images in [*previews, *result.stages.values()]:
        assert (pixels(images) == 0).all()


def test_what_each_stage_says_of_a_picture_is_told_together(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from floyd.models.safety import IFSafetyChecker, SafetyScores

    nsfw = {32: [5.0, -3.0], 48: [-2.0, -1.0]}
    watermark = {32: [-3.0, -3.0], 48: [-4.0, 0.75]}
    seen: list[int] = []

    def scores(self: Any, x: torch.Tensor) -> SafetyScores:
        side = 32 if not seen else 48
        seen.append(side)
        return SafetyScores(torch.tensor(nsfw[side]), torch.tensor(watermark[side]))

    monkeypatch.setattr(IFSafetyChecker, "scores", scores)
    for stage in cascade.stages.values():
        stage.watermarker = None
    result = cascade(PROMPT, size=48, count=2)
    assert seen == [32, 48]
    assert result.nsfw_detected == [True, False]
    assert result.watermark_detected == [False, True]
    assert result.nsfw_scores == [5.0, -1.0]
    assert result.watermark_scores == [-3.0, 0.75]
    assert [[image.any() for image in pixels(images)] for images in result.stages.values()] == [[False, True]] * 2
    warnings = [record.getMessage() for record in caplog.records if record.name == "floyd.pipelines.finish"]
    assert [text.split(" looks")[0] for text in warnings] == ["Picture 1 of 2", "Picture 2 of 2"]


def test_what_is_done_with_unsafe_pictures_is_said_once_for_all_stages(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    from floyd.models.safety import IFSafetyChecker, SafetyScores

    plain = cascade(PROMPT, size=48)
    verdict = SafetyScores(torch.tensor([5.0]), torch.tensor([-5.0]))
    monkeypatch.setattr(IFSafetyChecker, "scores", lambda self, x: verdict)
    flagged = cascade(PROMPT, size=48, safety="flag")
    assert flagged.nsfw_detected == [True]
    np.testing.assert_array_equal(pixels(flagged.images), pixels(plain.images))
    blurred = cascade(PROMPT, size=48, safety="blur")
    assert pixels(blurred.images).std() < pixels(plain.images).std() / 2
    with pytest.raises(SafetyError, match="Picture 1 of 1 looks unsafe"):
        cascade(PROMPT, size=48, safety="raise")
    for stage in cascade.stages.values():
        stage.safety_checker = None
    with pytest.raises(ValueError, match="needs a safety_checker, which none of stage_1, stage_2 has"):
        cascade(PROMPT, size=48, safety="raise")


# ------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("at", ["stage_1", "stage_2"])
def test_an_interrupted_run_ends_with_what_is_painted_so_far(cascade: Cascade, at: str) -> None:
    events = []
    for event in cascade.run(PROMPT, steps=3):
        events.append(event)
        if isinstance(event, StepDone) and event.stage == at and event.index == 1:
            shown = event.preview()
            cascade.interrupt()
    assert [type(event) for event in events[-2:]] == [StageDone, Done]
    assert [event.index for event in events if isinstance(event, StepDone) and event.stage == at] == [0, 1]
    result = events[-1].result
    assert result.is_interrupted
    assert list(result.stages)[-1] == at
    assert result.images == result.stages[at]
    np.testing.assert_array_equal(pixels(result.images), pixels(shown))
    whole = cascade(PROMPT, size=48)
    assert not whole.is_interrupted, "a later call is not affected"
    assert list(whole.stages) == ["stage_1", "stage_2"]


@pytest.mark.parametrize("is_left", [True, False])
def test_what_was_fetched_ahead_for_a_run_is_dropped_at_its_end(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch, is_left: bool
) -> None:
    dropped: list[int] = []
    monkeypatch.setattr("floyd.pipelines.run.drop_fetched", lambda component: dropped.append(id(component)))
    run = cascade.run(PROMPT, size=48, steps=1)
    next(run)
    assert dropped == []
    if is_left:
        run.close()
    else:
        list(run)
    assert {id(part) for stage in cascade.stages.values() for part in stage.components.values()} == set(dropped)


def test_another_thread_interrupts_a_call(cascade: Cascade) -> None:
    results: list[Any] = []
    is_painting = threading.Event()
    caller = threading.Thread(target=lambda: results.append(cascade(PROMPT, steps=(1000, 1, 1))))
    first = cascade.stages["stage_1"]
    unet, paint = first.unet, first.unet.paint

    def told(*args: Any, **kwargs: Any) -> Any:
        is_painting.set()
        return paint(*args, **kwargs)

    unet.paint = told
    try:
        caller.start()
        assert is_painting.wait(30)
        cascade.interrupt()
        caller.join(30)
    finally:
        del unet.paint
    assert not caller.is_alive()
    assert results[0].is_interrupted
    assert list(results[0].stages) == ["stage_1"]


def test_one_stage_can_be_ended_early_and_the_next_goes_on(cascade: Cascade) -> None:
    events = []
    for event in cascade.run(PROMPT, steps=3, size=48):
        events.append(event)
        if isinstance(event, StepDone) and event.stage == "stage_1":
            cascade.stages["stage_1"].interrupt()
    assert [(e.stage, e.index) for e in events if isinstance(e, StepDone)] == [
        ("stage_1", 0), ("stage_2", 0), ("stage_2", 1), ("stage_2", 2),
    ]  # fmt: skip
    assert list(events[-1].result.stages) == ["stage_1", "stage_2"]


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"size": 64}, ValueError, "one of 32, 48, 192"),
    ({"size": (192, 0)}, ValueError, "The height of size must be a number of pixels"),
    ({"size": (191, 192)}, ValueError, "192x192 would do"),
    ({"size": (5000, 40)}, ValueError, "stage_2 would have to paint 5000x40"),
    ({"count": 0}, ValueError, "count must be a positive int"),
    ({"seed": -1}, ValueError, "seed must be an int"),
    ({"seed": 0.5}, ValueError, "seed must be an int"),
    ({"prompt": ["a", "b"]}, TypeError, "prompt of a cascade is one str"),
    ({"negative_prompt": ["a"]}, TypeError, "negative_prompt of a cascade is one str"),
    ({"steps": 0}, ValueError, "steps must be a positive int"),
    ({"steps": (1, 2)}, ValueError, "one for each of stage_1, stage_2, stage_3"),
    ({"steps": ("fast28", 1, 1)}, ValueError, "fast27"),
    ({"steps": "fast27"}, TypeError, "StableDiffusionUpscalePipeline does not take timesteps"),
    ({"guidance": "high"}, ValueError, "finite number"),
    ({"options": {"stage_4": {}}}, ValueError, "stage_4"),
    ({"options": {"stage_2": {"noise": 1}}}, TypeError, "does not take noise"),
    ({"options": {"stage_2": {"noise_level": 1000}}}, ValueError, "noise_level of stage_2"),
    ({"options": {"stage_3": {"noise_level": 351}}}, ValueError, "noise_level of stage_3"),
    ({"options": {"stage_2": {"image": None}}}, ValueError, "image of stage_2 is what the cascade itself decides"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_a_bad_call_is_refused_at_once(
    cascade: Cascade, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cascade.run(**{"prompt": PROMPT, **arguments})


def test_stages_of_another_kind_are_refused(ours: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="stage_1 of a cascade is an IFPipeline, got a IFSuperResolutionPipeline"):
        Cascade(ours["two"])
    with pytest.raises(ValueError, match="one to 3 stages, got 0"):
        Cascade()
    with pytest.raises(ValueError, match="got 4"):
        Cascade.from_pretrained(*["a/b"] * 4)
    with pytest.raises(CheckpointError, match="holds none of them"):
        Cascade.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "presets",
    [{"stage_1": {"num_steps": 3}}, {"stage_1": {"num_inference_steps": 0}}, {"stage_2": {"noise_level": 2000}}],
)
def test_presets_that_cannot_be_used_are_refused_when_loaded(ours: dict[str, Any], presets: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"The presets of {next(iter(presets))} cannot be used"):
        Cascade(*ours.values(), presets=presets)


def test_a_saved_cascade_is_read_again(cascade: Cascade, tmp_path: Path) -> None:
    cascade.save_pretrained(tmp_path)
    again = Cascade.from_pretrained(tmp_path)
    assert again.presets == PRESETS
    np.testing.assert_array_equal(pixels(again(PROMPT, size=48).images), pixels(cascade(PROMPT, size=48).images))


def test_devices_and_offloading_are_passed_to_every_stage(root: Path) -> None:
    cascade = Cascade.from_pretrained(root)  # its own: casting changes the networks
    assert cascade.to(torch.bfloat16) is cascade
    assert {stage.unet.dtype for stage in cascade.stages.values()} == {torch.bfloat16}
    cascade.to(torch.float32)
    cascade.enable_model_cpu_offload(device="meta")
    assert {stage.device.type for stage in cascade.stages.values()} == {"meta"}
