"""Pipelines whose UNet is run by an engine."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import tiny

from floyd.errors import EngineError
from floyd.pipelines.cascade import Cascade
from floyd.pipelines.deepfloyd_if import IFImg2ImgPipeline
from floyd.runtime.budget import Budget

pytestmark = pytest.mark.usefixtures("compiled")


def call(which: str, seed: int = 0, batch: int = 1) -> dict[str, Any]:
    generator = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    common: dict[str, Any] = {"num_inference_steps": 3, "generator": generator, "output_type": "pt"}
    if which == "three":
        low_res = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        return {**common, "prompt": ["a cat"] * batch, "image": low_res, "noise_level": 20}
    positive, negative = tiny.embeds(batch)
    common |= {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    return common if which == "one" else {**common, "image": torch.rand(batch, 3, 16, 16) * 0 + 0.3}


@pytest.mark.parametrize("which", ["one", "two", "three"])
def test_the_picture_is_the_same(ours: dict[str, Any], which: str) -> None:
    pipe = ours[which]
    expected = pipe(**call(which)).images
    unet_step = pipe.unet.step
    pipe.use_engine("winograd")
    try:
        pipe.unet.step = None  # whoever asks the network itself fails
        got = pipe(**call(which)).images
    finally:
        del pipe.unet.step
    assert pipe.unet.step == unet_step
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    assert not torch.equal(got, expected)


def test_it_can_be_given_up_again(ours: dict[str, Any]) -> None:
    pipe = ours["one"]
    expected = pipe(**call("one")).images
    pipe.use_engine("winograd")
    pipe.use_engine(None)
    assert torch.equal(pipe(**call("one")).images, expected)


def test_it_comes_along_to_another_class(ours: dict[str, Any]) -> None:
    pipe = ours["one"]
    pipe.use_engine("winograd")
    vary = IFImg2ImgPipeline.from_pipe(pipe)
    assert vary._running(vary.unet) is pipe._running(pipe.unet)


def test_another_network_gets_an_engine_of_its_own(ours: dict[str, Any]) -> None:
    pipe = ours["one"]
    pipe.use_engine("winograd")
    first = pipe._running(pipe.unet)
    pipe.unet = copy.deepcopy(pipe.unet)
    second = pipe._running(pipe.unet)
    assert second is not first
    assert second.unet is pipe.unet
    assert pipe._running(pipe.unet) is second


def test_an_image_of_a_batch_is_that_of_a_call_of_its_own(ours: dict[str, Any]) -> None:
    pipe = ours["one"]
    pipe.use_engine("winograd")
    together = pipe(**call("one", batch=2), batch_invariant=True).images
    told = call("one", batch=2)
    alone = {
        key: value[1:] if key != "output_type" and key != "num_inference_steps" else value
        for key, value in told.items()
    }
    assert torch.equal(pipe(**alone, batch_invariant=True).images[0], together[1])


def test_a_refused_engine_changes_nothing(ours: dict[str, Any]) -> None:
    pipe = ours["one"]
    expected = pipe(**call("one")).images
    with pytest.raises(ValueError, match="'turbo'"):
        pipe.use_engine("turbo")
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(EngineError, match="forward hooks"):
            pipe.use_engine("winograd")
    finally:
        handle.remove()
    assert torch.equal(pipe(**call("one")).images, expected)


def test_the_upscalers_vae_is_decoded_by_the_engine_too(ours: dict[str, Any]) -> None:
    pipe = ours["three"]
    expected = pipe(**call("three")).images
    decoder = pipe.vae.decoder
    pipe.use_engine("winograd")
    try:
        decoder.forward = None  # whoever asks the decoder itself fails
        got = pipe(**call("three")).images
    finally:
        del decoder.forward
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    pipe.use_engine(None)
    torch.testing.assert_close(pipe(**call("three")).images, expected, atol=0, rtol=0)


def test_a_cascade_is_run_by_an_engine_in_all_stages_or_in_none(ours: dict[str, Any]) -> None:
    cascade = Cascade(*ours.values())
    cascade.use_engine("winograd")
    assert all(stage._engine is not None for stage in cascade.stages.values())
    cascade.use_engine(None)
    heavy = copy.deepcopy(ours["three"].unet).bfloat16()
    cascade.stages["stage_3"].unet = heavy
    with pytest.raises(EngineError):
        cascade.use_engine("winograd")
    assert all(stage._engine is None for stage in cascade.stages.values())


def test_auto_is_for_each_stage_and_call_what_can_run_it(ours: dict[str, Any]) -> None:
    cascade = Cascade(*ours.values())
    cascade.use_engine("auto")
    assert [stage.engine for stage in cascade.stages.values()] == ["winograd"] * 3
    pipe = ours["one"]
    by_engine = pipe(**call("one")).images
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    assert [stage.engine for stage in cascade.stages.values()] == [None, "winograd", "winograd"]
    plain = pipe(**call("one")).images
    handle.remove()
    assert not torch.equal(plain, by_engine)
    assert torch.equal(pipe(**call("one")).images, by_engine)
    cascade.use_engine(None)
    assert [stage.engine for stage in cascade.stages.values()] == [None] * 3
    torch.testing.assert_close(pipe(**call("one")).images, plain, atol=1e-4, rtol=0)


def test_auto_decodes_by_itself_what_the_engine_cannot(ours: dict[str, Any]) -> None:
    pipe = ours["three"]
    pipe.use_engine("winograd")
    expected = pipe(**call("three")).images
    pipe.use_engine("auto")
    assert torch.equal(pipe(**call("three")).images, expected)
    pipe.vae.decoder.conv_in.register_forward_hook(lambda *_: None)
    got = pipe(**call("three")).images
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)


def test_auto_leaves_alone_what_is_compiled(ours: dict[str, Any]) -> None:
    pipe = ours["one"]
    pipe.use_engine("auto")
    assert pipe.engine == "winograd"
    pipe.switches = replace(pipe.switches, compiled=True)
    assert pipe.engine is None


def test_an_engine_needs_a_network(ours: dict[str, Any]) -> None:
    for pipe in ours.values():
        pipe.unet = None
        with pytest.raises(ValueError, match="unet"):
            pipe.use_engine("auto")


def test_the_built_in_cascade_is_painted_by_an_engine() -> None:
    cascade = Cascade.built_in()
    assert [stage.engine for stage in cascade.stages.values()] == ["winograd"] * 3
    assert [stage.engine for stage in cascade.with_quality("draft").stages.values()] == ["winograd"] * 3
    planned = Cascade.built_in(memory=Budget(vram=0))
    assert [stage.engine for stage in planned.stages.values()] == [None] * 3
