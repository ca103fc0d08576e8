"""The engine "openvino" against the network whose place it takes."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from tests.engines.networks import NETWORKS, given, network, relative, stepped
from torch import nn

from floyd.engines.openvino import prepared
from floyd.errors import EngineError

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")

EXACT = 2e-5
FAST = ("stage I", "stage II", "time that is added")  # a conversion takes seconds


@needs_openvino
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NETWORKS]
)
def test_a_step_is_the_networks_own(name: str) -> None:
    unet = network(name)
    inputs = given(unet)
    assert relative(stepped(prepared(unet), *inputs), stepped(unet, *inputs)) < EXACT


@needs_openvino
def test_tokens_that_do_not_count_and_times_that_differ() -> None:
    unet = network()
    engine = prepared(unet)
    x_BCHW, text_BLE, _ = given(unet, size=(10, 14))
    mask_BL, t_B = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]), torch.tensor([3, 950])
    with torch.no_grad():
        expected = unet.step(x_BCHW, t_B, unet.read(text_BLE, None, mask_BL))
        got = engine.step(x_BCHW, t_B, engine.read(text_BLE, None, mask_BL))
    assert relative(got, expected) < EXACT


@needs_openvino
def test_bfloat16_is_close() -> None:
    unet = network()
    inputs = given(unet)
    assert relative(stepped(prepared(unet, precision="bf16"), *inputs), stepped(unet, *inputs)) < 0.1


@needs_openvino
@pytest.mark.parametrize("through_data", [False, True])
def test_changed_weights_are_converted_anew(through_data: bool) -> None:
    unet = network()
    engine = prepared(unet)
    inputs = given(unet)
    before = stepped(engine, *inputs)
    for parameter in unet.parameters():
        (parameter.data if through_data else parameter).mul_(1.1)
    after = stepped(engine, *inputs)
    assert relative(after, stepped(unet, *inputs)) < EXACT
    assert relative(before, after) > 1e-3


@needs_openvino
def test_a_result_is_not_written_to_later() -> None:
    unet = network()
    engine = prepared(unet)
    x_BCHW, text_BLE, _ = given(unet)
    first = stepped(engine, x_BCHW, text_BLE, None)
    kept = first.clone()
    stepped(engine, x_BCHW + 1, text_BLE, None)
    assert torch.equal(first, kept)


def test_without_openvino_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"pip install 'floyd-if\[openvino\]'"):
        prepared(network())


def test_what_it_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of f32, bf16, got 'int8'"):
        prepared(network(), precision="int8")
    with pytest.raises(TypeError, match="UNet2DConditionModel, got a Linear"):
        prepared(nn.Linear(1, 1))
    with pytest.raises(EngineError, match=r"torch_dtype=torch\.float32"):
        prepared(network().to(torch.bfloat16))
