"""A profile books all of a call's time, says how much there was to compute, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from tests.pipelines.seven import PROMPTS, SEVEN, built, told
from torch import Tensor

from floyd.diffusion.engine import STOP
from floyd.models.costs import decoder_cost, encoder_cost, unet_cost
from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.cascade import Cascade, StepDone
from floyd.pipelines.timed import timed_encoder, timed_network, timed_predict
from floyd.runtime import clock as clocks
from floyd.runtime.clock import is_watched
from floyd.runtime.placement import Assigned, LayerByLayer, OneAtATime, Placement, WhereTheyAre
from floyd.runtime.profile import Profile
from floyd.runtime.streaming import Streamed
from floyd.text.cache import TextCache

CPU = torch.device("cpu")
PROMPT = PROMPTS[0]


@pytest.fixture(autouse=True)
def nobody_watches() -> Any:
    yield
    assert not is_watched(), "a test left a clock behind"


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A second passes at every look at the clock; how many have passed."""
    seconds = count()
    latest = [0]

    def look() -> float:
        latest[0] = next(seconds)
        return float(latest[0])

    monkeypatch.setattr(clocks, "perf_counter", look)
    return lambda: latest[0]


@pytest.fixture
def cascade(ours: dict[str, Any]) -> Cascade:
    return Cascade(*ours.values(), presets={"stage_3": {"guidance_scale": 2.0}})


def rows(profile: Profile, stage: str | None = None) -> dict[str, Any]:
    """By part, of the only stage or of that one."""
    assert stage is not None or len(profile.stages) == 1
    return {row.part: row for row in profile.parts if stage in (None, row.stage)}


# ----------------------------------------------------------------------------------------------------------- all calls


@pytest.mark.parametrize("name", SEVEN)
def test_the_parts_of_a_call_add_up_to_the_whole(ours: dict[str, Any], name: str, ticks: Callable[[], int]) -> None:
    pipe = built(name, ours)
    with pipe.profile(floor=False) as profile:
        pipe(**told(name, 0))
    assert sum(row.seconds for row in profile.parts) + profile.outside_s == profile.seconds == ticks()
    assert profile.outside_s == 2  # from the block to the call, and back
    assert all(row.seconds > 0 for row in profile.parts)
    (stage,) = profile.stages
    found = rows(profile)
    assert stage == name
    assert {"text", "prepare", "unet", "guidance", "sampler", "transfers", "callbacks", "other"} <= set(found)
    assert ("vae" in found) == (name == "StableDiffusionUpscalePipeline")
    assert ("safety" in found) == (pipe.safety_checker is not None)
    steps = 2 if "strength" in told(name, 0) else 3
    counts = {part: found[part].count for part in ("unet", "guidance", "sampler", "callbacks")}
    assert counts == dict.fromkeys(counts, steps)
    assert profile.stages[stage].steps == steps


@pytest.mark.parametrize("name", SEVEN)
def test_a_watched_call_paints_the_same_with_the_same_draws(ours: dict[str, Any], name: str) -> None:
    pipe = built(name, ours)
    alone, watched = told(name, 0), told(name, 0)
    expected = pipe(**alone).images
    with pipe.profile(floor=False):
        images = pipe(**watched).images
    assert torch.equal(images, expected)
    states = [[one.get_state() for one in call["generator"]] for call in (alone, watched)]
    assert torch.equal(*(torch.stack(own) for own in states))


@pytest.mark.parametrize("name", ["IFPipeline", "StableDiffusionUpscalePipeline"])
def test_images_one_by_one_are_timed_too(ours: dict[str, Any], name: str, ticks: Callable[[], int]) -> None:
    pipe = built(name, ours)
    expected = pipe(**told(name, 0, 1), batch_invariant=True).images
    with pipe.profile(floor=False) as profile:
        images = pipe(**told(name, 0, 1), batch_invariant=True).images
    assert torch.equal(images, expected)
    assert profile.seconds == sum(row.seconds for row in profile.parts) + profile.outside_s
    assert rows(profile)["unet"].count == 3 * 2 * 2  # steps, images, branches
    assert profile.stages[name].steps == 3


def test_unwatched_nothing_is_wrapped(ours: dict[str, Any]) -> None:
    def anything(*args: Any) -> Any:
        """A network or what is made of it."""

    assert timed_network(anything, ours["one"].unet) is anything
    assert timed_predict(anything) is anything
    encoder = ours["one"].text_encoder
    assert timed_encoder(encoder, CPU) is encoder


def test_calls_accumulate(ours: dict[str, Any]) -> None:
    pipe = built("IFPipeline", ours)
    with pipe.profile(floor=False) as profile:
        for _ in range(2):
            pipe(**told("IFPipeline", 0))
    with profile:
        pipe(**told("IFPipeline", 0))
    assert profile.stages["IFPipeline"].steps == 9


def test_an_error_in_a_call_ends_the_watch(ours: dict[str, Any], ticks: Callable[[], int]) -> None:
    pipe = built("IFPipeline", ours)

    def fail(i: int, t: int, x_BCHW: Tensor) -> None:
        raise KeyError(i)

    with pytest.raises(KeyError), pipe.profile() as profile:
        pipe(**told("IFPipeline", 0), callback=fail)
    assert not is_watched()
    assert profile.seconds == sum(row.seconds for row in profile.parts) + profile.outside_s == ticks()
    assert rows(profile)["unet"].count == 1
    with profile:
        pipe(**told("IFPipeline", 0), callback=lambda i, t, x: STOP)
    assert rows(profile)["unet"].count == 2


def test_a_text_that_changes_on_the_way_is_timed_on(ours: dict[str, Any]) -> None:
    pipe = built("IFPipeline", ours)
    other, _ = pipe.encode_prompt(PROMPTS[1])

    def change(pipe: Any, i: int, t: int, tensors: Any) -> Any:
        return {"prompt_embeds": other} if i == 0 else None

    with pipe.profile(floor=False) as profile:
        pipe(
            **told("IFPipeline", 0),
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
    found = rows(profile)
    assert [found[part].count for part in ("prepare", "unet", "sampler")] == [2, 3, 3]


def test_two_threads_with_two_profiles_do_not_disturb_each_other(ours: dict[str, Any]) -> None:
    names = ("IFPipeline", "IFSuperResolutionPipeline")
    pipes = {name: built(name, ours) for name in names}
    meet = Barrier(2)
    found: dict[str, Profile] = {}

    def paint(name: str, calls: int) -> None:
        with pipes[name].profile(floor=False) as found[name]:
            meet.wait(timeout=30)
            for _ in range(calls):
                pipes[name](**told(name, 0))

    threads = [Thread(target=paint, args=(name, calls)) for name, calls in zip(names, (1, 2), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: list(profile.stages) for name, profile in found.items()} == {name: [name] for name in names}
    assert [found[name].stages[name].steps for name in names] == [3, 6]


# ---------------------------------------------------------------------------------------------------- work and places


def test_the_work_is_what_the_formulas_say(ours: dict[str, Any]) -> None:
    pipe = built("StableDiffusionUpscalePipeline", ours)
    with pipe.profile(floor=False) as profile:
        pipe(**told("StableDiffusionUpscalePipeline", 0, 1))
    found = rows(profile)
    config, steps, images, branches = pipe.unet.config, 3, 2, 2
    assert found["unet"].flops == steps * images * branches * unet_cost(config, 32, 32, num_text=77).flops
    assert found["vae"].flops == images * decoder_cost(pipe.vae.config, 32, 32).flops
    clip = pipe.text_encoder.config.to_dict()
    assert found["text"].flops == images * branches * encoder_cost(clip, num_tokens=77).flops
    assert found["text"].count == 2  # the prompts, then the empty ones


def test_a_step_without_guidance_is_less_work(ours: dict[str, Any]) -> None:
    pipe = built("IFPipeline", ours)
    with pipe.profile(floor=False) as profile:
        pipe(**{**told("IFPipeline", 0), "timesteps": [900, 500, 0]}, guidance_interval=(0, 600))
    row = rows(profile)["unet"]
    assert (row.count, row.flops) == (3, (1 + 2 + 2) * unet_cost(pipe.unet.config, 32, 32, num_text=77).flops)


def test_tiles_are_counted_with_what_they_share(ours: dict[str, Any]) -> None:
    pipe = built("StableDiffusionUpscalePipeline", ours)
    pipe.enable_vae_tiling(side=16)
    try:
        with pipe.profile(floor=False) as profile:
            pipe(**told("StableDiffusionUpscalePipeline", 0))
    finally:
        pipe.disable_vae_tiling()
    assert rows(profile)["vae"].flops == 9 * decoder_cost(pipe.vae.config, 16, 16).flops


def test_a_floor_is_what_the_work_takes_at_the_rate_that_was_measured(
    ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from floyd.runtime import profile as profiles
    from floyd.runtime.rates import Rate

    monkeypatch.setattr(profiles, "measured", lambda arithmetic: Rate(arithmetic, 1e9, 1))
    pipe = built("IFPipeline", ours)
    with pipe.profile() as profile:
        pipe(**told("IFPipeline", 0))
    row = rows(profile)["unet"]
    assert row.floor_s == pytest.approx(row.flops / 1e9)
    assert "1 GFLOP/s in float32 on cpu" in str(profile)
    assert rows(profile)["sampler"].floor_s is None


def test_fewer_rows_at_once_are_one_network_call(ours: dict[str, Any]) -> None:
    pipe = built("IFPipeline", ours)
    pipe.max_rows = 1
    with pipe.profile(floor=False) as profile:
        pipe(**told("IFPipeline", 0))
    row = rows(profile)["unet"]
    assert (row.count, row.flops) == (3, 3 * 2 * unet_cost(pipe.unet.config, 32, 32, num_text=77).flops)


@pytest.mark.parametrize("plan", [WhereTheyAre(), OneAtATime(CPU), LayerByLayer(CPU), "streamed"])
def test_every_placement_is_timed(ours: dict[str, Any], plan: Placement | str, ticks: Callable[[], int]) -> None:
    pipe = built("IFPipeline", ours)
    if isinstance(plan, str):
        plan = Assigned(WhereTheyAre(), {pipe.unet: Streamed(CPU, 600_000)})
    pipe._place(plan)
    expected = pipe(**told("IFPipeline", 0)).images
    with pipe.profile(floor=False) as profile:
        begun = ticks()
        images = pipe(**told("IFPipeline", 0)).images
    assert torch.equal(images, expected)
    assert sum(row.seconds for row in profile.parts) + profile.outside_s == ticks() - begun
    moves = rows(profile)["transfers"].seconds
    assert moves > 100 if isinstance(plan, LayerByLayer | Assigned) else moves < 20  # a second for each visit


# ------------------------------------------------------------------------------------------------------------ cascades


def test_a_cascade_is_timed_by_stage(cascade: Cascade, ticks: Callable[[], int]) -> None:
    with cascade.profile(floor=False) as profile:
        cascade(PROMPT, steps=[3, 2, 1])
    assert {name: stage.steps for name, stage in profile.stages.items()} == {"stage_1": 3, "stage_2": 2, "stage_3": 1}
    assert sum(stage.seconds for stage in profile.stages.values()) + profile.outside_s == profile.seconds == ticks()
    assert rows(profile, "stage_1")["text"].count == 2
    assert rows(profile, "stage_2")["text"].count == 0  # read once for both
    assert rows(profile, "stage_3")["vae"].count == 1


def test_a_watched_cascade_paints_the_same(cascade: Cascade) -> None:
    expected = cascade(PROMPT, steps=2).images[0]
    with cascade.profile(floor=False):
        image = cascade(PROMPT, steps=2).images[0]
    assert image.tobytes() == expected.tobytes()


def test_what_is_done_between_events_is_outside_but_previews_are_the_stages(
    cascade: Cascade, ticks: Callable[[], int]
) -> None:
    with cascade.profile(floor=False) as profile:
        for event in cascade.run(PROMPT, steps=1):
            for _ in range(1000):
                clocks.perf_counter()  # a second each
            if isinstance(event, StepDone):
                event.preview()
    assert profile.outside_s > 1000 * 8
    assert list(profile.stages) == ["stage_1", "stage_2", "stage_3"]
    assert rows(profile, "stage_3")["vae"].count == 2
    assert sum(stage.seconds for stage in profile.stages.values()) < 1000
    assert profile.seconds == ticks()


def test_a_run_that_is_left_is_booked_as_far_as_it_came(cascade: Cascade, ticks: Callable[[], int]) -> None:
    with cascade.profile(floor=False) as profile:
        for event in cascade.run(PROMPT, steps=3):
            if isinstance(event, StepDone):
                break
        cascade.stages["stage_1"].encode_prompt(PROMPT)
    assert profile.stages["stage_1"].steps == 1
    assert list(profile.stages) == ["stage_1", "IFPipeline"]
    assert profile.seconds == ticks()


def test_a_text_that_is_remembered_is_not_read(ours: dict[str, Any], cascade: Cascade) -> None:
    for stage in cascade.stages.values():
        stage.text_cache = TextCache()
    profiles = []
    for _ in range(2):
        with cascade.profile(floor=False) as profile:
            cascade(PROMPT, size=32, steps=1)
        profiles.append(rows(profile, "stage_1")["text"])
    assert [row.count for row in profiles] == [2, 0]
    assert profiles[0].flops > profiles[1].flops == 0


def test_an_encoder_that_is_loaded_again_is_a_transfer(folders: dict[str, Path], ticks: Callable[[], int]) -> None:
    cascade = Cascade.from_pretrained(folders["one"], folders["two"])
    cascade(PROMPT, size=32, steps=1, free_text_encoder=True)
    load: Any = cascade._load_text_encoder

    def slowly() -> Any:
        for _ in range(1000):
            clocks.perf_counter()  # a second each
        return load()

    cascade._load_text_encoder = slowly
    with cascade.profile(floor=False) as profile:
        cascade(PROMPT, size=32, steps=1)
    found = rows(profile, "stage_1")
    assert found["transfers"].seconds > 1000 > found["text"].seconds
    assert found["text"].count == 2


def test_a_plan_for_little_memory_is_timed(folders: dict[str, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(folders["one"], memory="auto")
    pipe.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    with pipe.profile(floor=False) as profile:  # type: ignore[attr-defined]
        pipe(PROMPT, num_inference_steps=2)  # type: ignore[operator]
    assert profile.stages["IFPipeline"].steps == 2
