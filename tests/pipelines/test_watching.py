"""Callbacks see and change the chain, and whoever asks from outside ends it within a step."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from floyd.diffusion.engine import STOP
from floyd.pipelines.deepfloyd_if import IFInpaintingPipeline
from floyd.pipelines.watching import Interrupts

POSITIVE, NEGATIVE = tiny.embeds()
OTHER_POSITIVE, OTHER_NEGATIVE = tiny.embeds(seed=9)
TEXT: dict[str, Any] = {"prompt_embeds": POSITIVE, "negative_prompt_embeds": NEGATIVE}
LOW: dict[str, Any] = {**TEXT, "image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1}
ALL = ["x", "clean", "prompt_embeds", "negative_prompt_embeds"]
STAGES = ["one", "two", "three"]


def told(stage: str) -> dict[str, Any]:
    return TEXT if stage == "one" else LOW


def paint(pipe: Any, on_end: Any = None, names: Any = ("x",), **arguments: Any) -> torch.Tensor:
    given = {"num_inference_steps": 3, "output_type": "pt", **arguments}
    picture: torch.Tensor = pipe(
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=on_end,
        callback_on_step_end_tensor_inputs=names,
        **given,
    ).images
    return picture


@pytest.mark.parametrize("stage", STAGES)
def test_a_callback_is_handed_what_it_asks_for_after_every_step(ours: dict[str, Any], stage: str) -> None:
    seen: list[tuple[Any, ...]] = []
    pipe, task = ours[stage], ours[stage].task(**told(stage), num_inference_steps=3)

    def look(*given: Any) -> dict[str, Any]:
        seen.append(given)
        return given[3]  # type: ignore[no-any-return]

    plain = paint(pipe, **told(stage))
    assert torch.equal(paint(pipe, look, ALL, **told(stage)), plain)
    assert [(place, i, t) for place, i, t, _ in seen] == [(pipe, i, step.t) for i, step in enumerate(task.steps)]
    for _, _, _, tensors in seen:
        assert list(tensors) == ALL
        assert tensors["x"].shape == tensors["clean"].shape == task.canvas.picture_BCHW.shape
        assert torch.equal(tensors["prompt_embeds"], POSITIVE)
        assert torch.equal(tensors["negative_prompt_embeds"], NEGATIVE)


def test_what_comes_back_is_what_the_chain_goes_on_with(ours: dict[str, Any]) -> None:
    def wipe(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"x": torch.full_like(tensors["x"], 0.25)} if i == 2 else {}

    assert (paint(ours["one"], wipe, **TEXT) == 0.25).all()

    xs: list[torch.Tensor] = []

    def shift(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        xs.append(tensors["latents"])
        return {"latents": tensors["latents"] + 1.0}

    shifted = paint(ours["one"], shift, ["latents"], **TEXT)
    assert torch.equal(shifted, xs[-1] + 1.0)
    assert not torch.allclose(shifted, paint(ours["one"], **TEXT) + 1.0, atol=1e-3)


def test_only_what_comes_back_counts(ours: dict[str, Any]) -> None:
    def scribble(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    assert torch.equal(paint(ours["one"], scribble, ALL, **TEXT), paint(ours["one"], **TEXT))


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_another_prompt_is_read_again_from_the_next_step_on(
    ours: dict[str, Any], stage: str, batch_invariant: bool
) -> None:
    other = {"prompt_embeds": OTHER_POSITIVE, "negative_prompt_embeds": OTHER_NEGATIVE}
    names = [*other, "x"]

    def change_at(place: int) -> Any:
        return lambda pipe, i, t, tensors: {**tensors, **other} if i == place else None

    pipe = ours[stage]
    arguments = {**told(stage), "batch_invariant": batch_invariant, "num_inference_steps": 2}
    plain = paint(pipe, **arguments)
    assert torch.equal(paint(pipe, change_at(1), names, **arguments), plain)
    assert not torch.allclose(paint(pipe, change_at(0), names, **arguments), plain, atol=1e-3)

    def back_to_the_start(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        return {**other, "x": start} if i == 0 else {}

    start = torch.zeros_like(pipe.task(**arguments).canvas.picture_BCHW)
    changed = paint(pipe, back_to_the_start, names, **arguments)
    whole = paint(pipe, back_to_the_start, names, **{**arguments, **other})
    assert torch.allclose(changed, whole, atol=1e-5)


def test_the_network_reads_the_text_anew_only_when_it_changed(
    ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, count = type(ours["one"].unet), []
    read = kind.read

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        count.append(1)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(kind, "read", counting)
    paint(ours["one"], lambda pipe, i, t, tensors: tensors, ALL, **TEXT)
    assert len(count) == 1
    paint(ours["one"], lambda pipe, i, t, tensors: {"prompt_embeds": OTHER_POSITIVE}, ALL, **TEXT)
    assert len(count) == 3


def test_without_guidance_there_is_no_negative_prompt_to_ask_for(ours: dict[str, Any]) -> None:
    seen: list[Any] = []
    arguments = {"prompt_embeds": POSITIVE, "guidance_scale": 1.0}

    def look(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["negative_prompt_embeds"])
        return tensors

    paint(ours["one"], look, ALL, **arguments)
    assert seen == [None] * 3
    with pytest.raises(ValueError, match="without guidance has none"):
        paint(ours["one"], lambda *_: {"negative_prompt_embeds": NEGATIVE}, ALL, **arguments)


def test_kept_pixels_stay_whatever_a_callback_returns(ours: dict[str, Any]) -> None:
    pipe = IFInpaintingPipeline(**ours["one"].components)
    picture = LOW["image"]
    mask = torch.zeros(32, 32)
    mask[:16] = 1
    painted = paint(pipe, lambda pipe, i, t, tensors: {"x": tensors["x"] * 0}, **TEXT, image=picture, mask_image=mask)
    assert torch.equal(painted[:, :, 16:], picture[:, :, 16:])
    assert (painted[:, :, :16] == 0).all()


ANSWERS: list[tuple[Any, type[Exception], str]] = [
    (True, TypeError, "must return a dict"),
    ({"x": 3}, TypeError, "x as int"),
    ({"x": None}, TypeError, "x as NoneType"),
    ({"x": torch.zeros(1, 3, 8, 8)}, ValueError, r"x of shape \[1, 3, 8, 8\]; it must keep \[1, 3, 32, 32\]"),
    ({"prompt_embeds": POSITIVE[:, 1:]}, ValueError, "prompt_embeds of shape"),
    ({"guidance_scale": torch.ones(1)}, ValueError, "did not ask for"),
    ({"latents": torch.zeros(1, 3, 32, 32)}, ValueError, "did not ask for"),
    ({"clean": torch.zeros(1, 3, 32, 32)}, ValueError, "only to be read"),
]


@pytest.mark.parametrize(("answer", "error", "message"), ANSWERS, ids=range(len(ANSWERS)))
def test_an_answer_that_makes_no_sense_is_refused(
    ours: dict[str, Any], answer: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        paint(ours["one"], lambda *_: answer, ALL, **TEXT)


def test_both_callbacks_are_asked_and_the_old_one_sees_what_the_new_one_changed(ours: dict[str, Any]) -> None:
    seen: list[tuple[int, float]] = []
    paint(
        ours["one"],
        lambda pipe, i, t, tensors: {"x": torch.full_like(tensors["x"], float(i))},
        **TEXT,
        callback=lambda i, t, x: seen.append((i, x.mean().item())),
        callback_steps=2,
    )
    assert seen == [(0, 0.0), (2, 2.0)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_preview_shows_the_picture_that_x_is_heading_for(ours: dict[str, Any], stage: str) -> None:
    previews: list[Any] = []

    def look(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> None:
        previews.append(np.asarray(pipe.preview(tensors["clean"])[0]))

    output = ours[stage](
        **told(stage),
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=3,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["clean"],
    )
    assert len(previews) == 3
    assert {preview.shape for preview in previews} == {np.asarray(output.images[0]).shape}
    assert (previews[0] != previews[2]).any()
    if stage != "three":  # the last step of IF goes all the way
        np.testing.assert_allclose(previews[2].astype(int), np.asarray(output.images[0]).astype(int), atol=1)


# ------------------------------------------------------------------------------------------------------- stopping


def interrupt(pipe: Any) -> None:
    pipe.interrupt()


def switch(pipe: Any) -> None:
    pipe._interrupt = True  # the incumbent's way


@pytest.mark.parametrize("how", [interrupt, switch, "stop"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_callback_ends_its_call_after_the_step_it_is_at(ours: dict[str, Any], stage: str, how: Any) -> None:
    pipe, cleans = ours[stage], []

    def look(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> Any:
        cleans.append(tensors["clean"])
        if i == 1:
            return STOP if how == "stop" else how(pipe)
        return None

    more = {"output_type": "latent"} if stage == "three" else {}
    picture = paint(pipe, look, ["clean"], **told(stage), num_inference_steps=5, **more)
    assert len(cleans) == 2
    assert torch.equal(picture, cleans[1])
    assert pipe._interrupt is False

    assert paint(pipe, look, ["clean"], **told(stage), num_inference_steps=1).shape[0] == 1
    assert len(cleans) == 3, "a later call is not affected"


def test_another_thread_ends_a_running_call(ours: dict[str, Any]) -> None:
    pipe, steps, result = ours["one"], [], []
    is_running, may_go_on = threading.Event(), threading.Event()

    def slow(i: int, t: int, x: torch.Tensor) -> None:
        steps.append(i)
        if i == 2:
            is_running.set()
            assert may_go_on.wait(30)

    def call() -> None:
        result.append(paint(pipe, **TEXT, num_inference_steps=200, callback=slow))

    painter = threading.Thread(target=call)
    painter.start()
    assert is_running.wait(30)
    assert pipe._interrupt is False
    pipe.interrupt()
    assert pipe._interrupt is True
    may_go_on.set()
    painter.join(30)
    assert not painter.is_alive()
    assert steps == [0, 1, 2], "it stopped within the step"
    assert result[0].shape == (1, 3, 32, 32)
    assert result[0].abs().max() <= 1.5, "a clean picture, not a noisy one"
    assert torch.equal(paint(pipe, **TEXT), paint(pipe, **TEXT))


def test_an_interrupt_before_the_first_step_waits_for_that_step_alone(
    ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, steps = ours["one"], []
    encode = type(pipe).encode_prompt

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.interrupt()  # as if from another thread, while T5 reads
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "encode_prompt", interrupted)
    paint(pipe, **TEXT, num_inference_steps=50, callback=lambda i, t, x: steps.append(i))
    assert steps == [0]


def test_an_interrupt_ends_all_calls_under_way_on_a_pipeline_and_those_of_no_other(ours: dict[str, Any]) -> None:
    def task(pipe: Any) -> Any:
        return pipe.watch(pipe.task(**TEXT, num_inference_steps=4, generator=torch.Generator().manual_seed(0)))

    pipe = ours["one"]
    other = type(pipe)(**pipe.components)
    first, second, third = task(pipe), task(pipe), task(other)
    for moves in (first, second, third):
        next(moves)
    pipe.interrupt()
    assert [len(list(moves)) for moves in (first, second, third)] == [0, 0, 3]
    assert len(list(task(pipe))) == 4


def test_nothing_to_interrupt_is_no_error(ours: dict[str, Any]) -> None:
    ours["one"].interrupt()
    ours["one"]._interrupt = False
    assert ours["one"]._interrupt is False


def test_an_end_does_not_outlast_its_call() -> None:
    interrupts = Interrupts()
    with interrupts.call() as first:
        with interrupts.call() as second:
            assert interrupts.end_all() == 2
        assert first.is_set()
        assert second.is_set()
    with interrupts.call() as third:
        assert not third.is_set()
        assert not interrupts.is_ending
    with pytest.raises(RuntimeError, match="broken"), interrupts.call():
        raise RuntimeError("broken")
    assert interrupts.end_all() == 0
