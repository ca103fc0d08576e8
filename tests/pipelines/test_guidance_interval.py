"""Guidance at some noise levels alone: there it is guidance, elsewhere there is none, and the network is asked once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.pipelines.seven import SEVEN, built, told
from tests.runtime.test_graphs import Tape
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from floyd import EulerAncestralDiscreteScheduler, HeunDiscreteScheduler
from floyd.pipelines import network
from floyd.pipelines.cascade import Cascade
from floyd.pipelines.order import arguments_of
from floyd.runtime.graphs import Graphed
from floyd.runtime.switches import Switches

MIDDLE = (300, 700)


@pytest.fixture
def unchecked(ours: dict[str, Any]) -> dict[str, Any]:
    """Without the safety checker, which is tested elsewhere and takes its time."""
    for pipe in ours.values():
        pipe.safety_checker = pipe.feature_extractor = pipe.watermarker = None
    return ours


def pixels(pipe: Any, **arguments: Any) -> Tensor:
    images: Tensor = pipe(**arguments).images
    return images


def predictions(pipe: Any, arguments: dict[str, Any], x_BCHW: Tensor | None = None) -> list[tuple[int, Any]]:
    """What the chain of such a call would predict at each of its timesteps, of one and the same noise."""
    with pipe._placement.use(pipe.unet) as unet:
        chain = pipe._chain(pipe.task(**arguments), unet)
        return [(step.t, chain.predict(chain.x_BCHW, step.t)) for step in chain.steps]


def check_that_each_step_is_one_or_the_other(pipe: Any, arguments: dict[str, Any]) -> None:
    guided, alone, either = (
        predictions(pipe, {**arguments, **more, "generator": torch.Generator().manual_seed(0)})
        for more in ({}, {"guidance_scale": 1.0}, {"guidance_interval": MIDDLE})
    )
    inside = [MIDDLE[0] <= t < MIDDLE[1] for t, _ in either]
    assert any(inside)
    assert not all(inside)
    for is_guided, (_, got), (_, with_it), (_, without) in zip(inside, either, guided, alone, strict=True):
        wanted = with_it if is_guided else without
        for part, expected in zip(got, wanted, strict=True):
            assert (part is None and expected is None) or torch.equal(part, expected)
        assert not torch.equal(with_it.target_BCHW, without.target_BCHW)


@pytest.mark.parametrize("name", SEVEN)
def test_within_it_is_guidance_and_elsewhere_none(unchecked: dict[str, Any], name: str) -> None:
    check_that_each_step_is_one_or_the_other(built(name, unchecked), told(name, 0))


@pytest.mark.parametrize("name", ["IFPipeline", "StableDiffusionUpscalePipeline"])
def test_so_it_is_image_by_image(unchecked: dict[str, Any], name: str) -> None:
    arguments = {**told(name, 0, 1), "batch_invariant": True}
    check_that_each_step_is_one_or_the_other(built(name, unchecked), arguments)


@pytest.mark.parametrize(
    "switches", [Switches.off(), Switches.on(), Switches.best_for("cuda")], ids=["off", "on", "gpu"]
)
@pytest.mark.parametrize("max_rows", [None, 1, 3])
def test_so_it_is_with_every_switch_and_in_pieces(
    unchecked: dict[str, Any], switches: Switches, max_rows: int | None
) -> None:
    pipe = built("IFPipeline", unchecked)
    pipe.switches, pipe.max_rows = switches, max_rows
    check_that_each_step_is_one_or_the_other(pipe, told("IFPipeline", 0, 1))


@pytest.mark.usefixtures("compiled")
def test_so_it_is_with_an_engine(unchecked: dict[str, Any]) -> None:
    pipe = built("IFSuperResolutionPipeline", unchecked)
    pipe.use_engine("winograd")
    check_that_each_step_is_one_or_the_other(pipe, told("IFSuperResolutionPipeline", 0))


def test_so_it_is_with_recorded_steps(unchecked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two is recorded for itself."""
    pipe = built("IFPipeline", unchecked)
    pipe.switches = Switches(read_once=True)
    arguments = {**told("IFPipeline", 0), "num_inference_steps": 8, "guidance_interval": MIDDLE}
    expected = pixels(pipe, **{**arguments, "generator": torch.Generator().manual_seed(0)})
    tape = Tape()
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(network, "Graphed", lambda paint: Graphed(paint, tape))
    pipe.switches = Switches(read_once=True, graphs=True)
    got = pixels(pipe, **{**arguments, "generator": torch.Generator().manual_seed(0)})
    assert torch.equal(got, expected)
    assert tape.num_recordings == 2


@pytest.mark.slow
def test_a_compiled_network_is_compiled_for_either_and_no_more(
    unchecked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter, pipe, compiler = CompileCounter(), built("IFPipeline", unchecked), torch.compile
    arguments = {**told("IFPipeline", 0), "num_inference_steps": 8, "guidance_interval": MIDDLE}
    expected = pixels(pipe, **{**arguments, "generator": torch.Generator().manual_seed(0)})
    monkeypatch.setattr(torch, "compile", lambda work, **options: compiler(work, backend=counter, **options))
    pipe.compile()
    for _ in range(2):
        got = pixels(pipe, **{**arguments, "generator": torch.Generator().manual_seed(0)})
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("name", SEVEN)
def test_an_interval_that_is_whole_changes_no_bit(unchecked: dict[str, Any], name: str) -> None:
    pipe = built(name, unchecked)
    assert torch.equal(pixels(pipe, **told(name, 0)), pixels(pipe, **told(name, 0), guidance_interval=(0, 1000)))


@pytest.mark.parametrize("kind", [None, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler])
def test_the_network_is_given_half_the_rows_outside(
    unchecked: dict[str, Any], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no step is both."""
    pipe = built("IFPipeline", unchecked)
    if kind is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    rows, paint = [], pipe.unet.paint

    def counting(sample: Tensor, time_BS: Tensor, context: Any) -> Tensor:
        rows.append(len(sample))
        out: Tensor = paint(sample, time_BS, context)
        return out

    monkeypatch.setattr(pipe.unet, "paint", counting)
    arguments = {**told("IFPipeline", 0, 1), "num_inference_steps": 10, "guidance_interval": MIDDLE}
    times = [step.t for step in pipe.task(**arguments).steps]
    pipe(**arguments)
    assert rows == [4 if t in range(*MIDDLE) else 2 for t in times]
    assert sum(rows) < 4 * len(times)


def test_another_prompt_on_the_way_is_heard_within_and_without(unchecked: dict[str, Any]) -> None:
    pipe = built("IFPipeline", unchecked)
    arguments = {**told("IFPipeline", 0), "num_inference_steps": 6, "guidance_interval": MIDDLE}
    asked = ["prompt_embeds"]

    def painted(at: int | None) -> Tensor:
        def end(_: Any, i: int, t: int, tensors: dict[str, Any]) -> Any:
            return {"prompt_embeds": 2 * tensors["prompt_embeds"]} if i == at else None

        watched = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": asked}
        return pixels(pipe, **{**arguments, **watched, "generator": torch.Generator().manual_seed(0)})

    as_it_was = painted(None)
    assert not any(torch.equal(painted(at), as_it_was) for at in (0, 2, 4))
    assert torch.equal(painted(5), as_it_was)  # after the last step


def test_a_chain_takes_one_interval_for_all_or_one_for_each(unchecked: dict[str, Any]) -> None:
    cascade = Cascade(unchecked["one"], unchecked["two"])

    def arguments(interval: Any) -> list[Any]:
        told = arguments_of(cascade.stages, {}, list(cascade.stages), guidance_interval=interval)
        return [own.get("guidance_interval") for own in told.values()]

    assert arguments(MIDDLE) == [MIDDLE, MIDDLE]
    assert arguments([MIDDLE, None]) == [MIDDLE, None]
    assert arguments(None) == [None, None]
    result, by_hand, without = (
        cascade("a cat", size=32, steps=3, **more)
        for more in (
            {"guidance_interval": MIDDLE},
            {"options": {"stage_1": {"guidance_interval": list(MIDDLE)}}},
            {},
        )
    )
    assert result.images[0].tobytes() == by_hand.images[0].tobytes()
    assert result.images[0].tobytes() != without.images[0].tobytes()
