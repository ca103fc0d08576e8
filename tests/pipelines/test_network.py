"""Switches leave pictures as they are, and a picture never comes of weights that are no more."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

import pytest
import torch
from tests import tiny
from tests.runtime.test_graphs import Tape
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from floyd.diffusion.conditioning import Conditioning
from floyd.pipelines import network
from floyd.pipelines.network import Networks
from floyd.runtime.graphs import Graphed
from floyd.runtime.placement import LayerByLayer
from floyd.runtime.switches import Switches

POSITIVE, NEGATIVE = tiny.embeds()
TEXT: dict[str, Any] = {"prompt_embeds": POSITIVE, "negative_prompt_embeds": NEGATIVE}
LOW: dict[str, Any] = {**TEXT, "image": torch.zeros(1, 3, 32, 32)}
TOLD = {"one": TEXT, "two": LOW, "three": LOW}
ALONE = {f.name: Switches(**{"read_once": True, f.name: True}) for f in fields(Switches) if f.name != "compiled"}
EVERY: dict[str, Switches] = {"off": Switches.off(), **ALONE, "on": Switches.on(), "gpu": Switches.best_for("cuda")}


def paint(pipe: Any, **arguments: Any) -> Tensor:
    given = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(0), **arguments}
    picture: Tensor = pipe(**given).images
    return picture


@pytest.fixture(scope="module")
def plain(loaded: dict[str, Any]) -> dict[str, Tensor]:
    pictures = {}
    for stage, arguments in TOLD.items():
        pipe = type(loaded[stage]).from_pipe(loaded[stage])
        pipe.set_progress_bar_config(disable=True)
        pipe.switches = Switches.off()
        pictures[stage] = paint(pipe, **arguments)
    return pictures


@pytest.mark.parametrize("stage", TOLD)
@pytest.mark.parametrize("switch", EVERY)
def test_every_switch_leaves_the_picture(
    ours: dict[str, Any], plain: dict[str, Tensor], stage: str, switch: str
) -> None:
    ours[stage].switches = EVERY[switch]
    torch.testing.assert_close(paint(ours[stage], **TOLD[stage]), plain[stage], atol=2e-4, rtol=0)


@pytest.mark.parametrize("stage", TOLD)
def test_weights_that_change_between_two_steps_paint_the_rest(ours: dict[str, Any], stage: str) -> None:
    pipe = ours[stage]
    weights = [pipe.unet.conv_in.weight, pipe.unet.mid_block.resnets[0].time_emb_proj.weight]

    def change(_: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(0.5)
        return kwargs

    def restored(switches: Switches, **more: Any) -> Tensor:
        pipe.switches, before = switches, [weight.detach().clone() for weight in weights]
        try:
            return paint(pipe, **TOLD[stage], **more)
        finally:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)

    untouched = restored(Switches.on())
    changed = restored(Switches.on(), callback_on_step_end=change)
    assert (changed - untouched).abs().max() > 1e-3
    plainly = restored(Switches.off(), callback_on_step_end=change)
    torch.testing.assert_close(changed, plainly, atol=2e-4, rtol=0)


@pytest.mark.parametrize("switch", ["off", "on"])
@pytest.mark.parametrize("stage", ["one", "two"])
def test_an_image_depends_on_itself_alone_whatever_is_on(ours: dict[str, Any], stage: str, switch: str) -> None:
    pipe = ours[stage]
    pipe.switches = EVERY[switch]
    positive, negative = tiny.embeds(2)
    low = {} if stage == "one" else {"image": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}

    def painted(images: list[int]) -> Tensor:
        own = {name: value[images] for name, value in low.items()}
        text = {"prompt_embeds": positive[images], "negative_prompt_embeds": negative[images]}
        generators = [torch.Generator().manual_seed(i) for i in images]
        return paint(pipe, **text, **own, generator=generators, batch_invariant=True)

    assert torch.equal(painted([0, 1])[1:], painted([1]))


def test_branches_that_are_told_apart_share_the_copies_of_the_weights(ours: dict[str, Any]) -> None:
    networks = Networks.of(ours["one"].unet, Switches.on(), (3, 2))
    assert networks.ready is not None
    assert networks.renewed().ready is not networks.ready


def test_what_moves_layer_by_layer_is_left_as_it_is(ours: dict[str, Any], plain: dict[str, Tensor]) -> None:
    pipe = ours["one"]
    pipe._place(LayerByLayer(torch.device("cpu")))
    with pipe._placement.use(pipe.unet) as unet:
        assert Networks.of(unet, Switches.on()).ready is None
    assert torch.equal(paint(pipe, **TEXT), plain["one"])


def test_switches_are_what_was_set_and_the_best_until_then(ours: dict[str, Any]) -> None:
    pipe = ours["one"]
    assert pipe.switches == Switches.best_for("cpu")
    pipe.switches = Switches(read_once=True)
    assert type(pipe).from_pipe(pipe).switches == Switches(read_once=True)
    pipe.switches = None
    assert pipe.switches == Switches.best_for("cpu")
    with pytest.raises(TypeError, match="Switches or None"):
        pipe.switches = {"read_once": True}


@pytest.mark.parametrize("stage", TOLD)
def test_a_step_that_is_recorded_paints_the_same(
    ours: dict[str, Any], plain: dict[str, Tensor], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = Tape()
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(network, "Graphed", lambda paint: Graphed(paint, tape))
    ours[stage].switches = Switches.on()
    torch.testing.assert_close(paint(ours[stage], **TOLD[stage]), plain[stage], atol=2e-4, rtol=0)
    assert tape.num_recordings == 1


@pytest.mark.gpu
@pytest.mark.parametrize("stage", TOLD)
def test_a_step_that_is_recorded_on_cuda_paints_the_same(ours: dict[str, Any], stage: str) -> None:
    pipe = ours[stage]
    pictures = []
    try:
        pipe.to("cuda")
        for switches in (Switches(read_once=True), Switches.on()):
            pipe.switches = switches
            pictures.append(paint(pipe, **TOLD[stage], num_inference_steps=6))
    finally:
        pipe.to("cpu")
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", TOLD)
@pytest.mark.parametrize("how", ["torch.compile(pipe.unet)", "pipe.compile()"])
def test_a_network_is_compiled_once_for_all_steps_and_pictures(
    ours: dict[str, Any], plain: dict[str, Tensor], stage: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter, pipe = CompileCounter(), ours[stage]
    compiler = torch.compile
    if how == "pipe.compile()":
        monkeypatch.setattr(torch, "compile", lambda work, **options: compiler(work, backend=counter, **options))
        pipe.compile()
        assert pipe.switches.compiled
    else:
        pipe.unet = compiler(pipe.unet, backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(paint(pipe, **TOLD[stage]), plain[stage], atol=2e-4, rtol=0)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_what_compiling_means_depends_on_the_device() -> None:
    assert Switches.off().when_compiled("cpu") == Switches(read_once=True, compiled=True)
    assert Switches.off().when_compiled("cuda") == Switches(read_once=True, compiled=True, graphs=True)
    assert Switches.off().when_compiled("mps") == Switches.off()


@pytest.mark.parametrize(
    ("dtype", "is_native", "num_told"),
    [(torch.bfloat16, False, 1), (torch.bfloat16, True, 0), (torch.float32, False, 0)],
)
def test_a_precision_that_is_emulated_is_told_once(
    loaded: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    is_native: bool,
    num_told: int,
) -> None:
    monkeypatch.setattr(network, "computes_in", lambda asked, device: is_native or asked == torch.float32)
    network._warn_of_emulation.cache_clear()
    unet = deepcopy(loaded["one"].unet).to(dtype)
    for _ in range(2):
        Networks.of(unet, Switches.off()).told(Conditioning(POSITIVE))
    told = [record.getMessage() for record in caplog.records if record.name == network.log.name]
    assert len(told) == num_told
    assert all("no instructions for bfloat16" in message for message in told)
