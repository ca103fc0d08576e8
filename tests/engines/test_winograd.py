"""The engine "winograd" against the network whose place it takes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest
import torch
from tests.engines.networks import NETWORKS, given, network, relative, stepped
from torch import nn

from floyd.engines.native import Kernels, kernels
from floyd.engines.winograd import WinogradUNet, prepared
from floyd.errors import EngineError
from floyd.runtime.threads import one_thread

pytestmark = pytest.mark.usefixtures("compiled")

EXACT = 2e-5  # of the largest number; what is promised is 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_the_networks_own(name: str) -> None:
    unet = network(name)
    inputs = given(unet)
    assert relative(stepped(prepared(unet), *inputs), stepped(unet, *inputs)) < EXACT


@pytest.mark.parametrize("name", ["stage I", "stage II", "upscaler", "odd widths"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(6, 10), (22, 14), (36, 34)])
def test_any_batch_and_any_size(name: str, batch: int, size: tuple[int, int]) -> None:
    unet = network(name)
    inputs = given(unet, batch, size, tokens=3 * batch)
    assert relative(stepped(prepared(unet), *inputs), stepped(unet, *inputs)) < EXACT


def test_a_latent_network_takes_odd_sizes() -> None:
    unet = network("upscaler")
    inputs = given(unet, size=(13, 7))
    assert relative(stepped(prepared(unet), *inputs), stepped(unet, *inputs)) < EXACT


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are numbered in turn on Linux")
def test_a_step_starts_no_threads() -> None:
    """A parallel region inside an idle one makes new ones each time, and they fight with those that wait for work."""
    unet = network()
    x_BCHW, text_BLE, _ = given(unet, size=(16, 16))
    engine = prepared(unet)
    if not kernels().has_threads:
        pytest.skip("compiled without OpenMP")
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        context = engine.read(text_BLE)
        engine.step(x_BCHW, 5, context)  # this one may
        started = []
        for _ in range(5):  # other processes start some as well, but not always
            before = number_of_a_new_thread()
            engine.step(x_BCHW, 5, context)
            started.append(number_of_a_new_thread() - before - 1)
    finally:
        torch.set_num_threads(usual)
    assert min(started) < 5


def number_of_a_new_thread() -> int:
    thread = Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    return thread.native_id


def test_tokens_that_do_not_count_are_not_looked_at() -> None:
    unet = network()
    engine = prepared(unet)
    x_BCHW, text_BLE, _ = given(unet)
    mask_BL = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        expected = unet.step(x_BCHW, 5, unet.read(text_BLE, None, mask_BL))
        got = engine.step(x_BCHW, 5, engine.read(text_BLE, None, mask_BL))
    assert relative(got, expected) < EXACT


def test_times_may_differ_within_a_batch() -> None:
    unet = network("stage II")
    inputs = given(unet)
    t_B = torch.tensor([3, 950])
    engine = prepared(unet)
    with torch.no_grad():
        expected = unet.step(inputs[0], t_B, unet.read(*inputs[1:]))
        got = engine.step(inputs[0], t_B, engine.read(*inputs[1:]))
    assert relative(got, expected) < EXACT


def test_it_stays_exact_where_a_norms_mean_is_far_from_zero() -> None:
    unet = network()
    unet.conv_in.bias += 300
    inputs = given(unet)
    assert relative(stepped(prepared(unet), *inputs), stepped(unet, *inputs)) < 1e-3
    assert relative(stepped(prepared(unet), *inputs), stepped(copy.deepcopy(unet).double(), *doubled(inputs))) < 1e-3


def doubled(inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    return tuple(part.double() if part is not None and part.is_floating_point() else part for part in inputs)  # type: ignore[misc]


# --- what it promises


def test_an_image_does_not_depend_on_its_batch_nor_on_the_threads() -> None:
    unet = network("three levels")
    engine = prepared(unet)
    x_BCHW, text_BLE, _ = given(unet, batch=3, size=(24, 20))
    together = stepped(engine, x_BCHW, text_BLE, None)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(stepped(engine, x_BCHW, text_BLE, None), together)
    finally:
        torch.set_num_threads(usual)
    with one_thread():
        assert torch.equal(stepped(engine, x_BCHW, text_BLE, None), together)


def test_threads_may_share_it() -> None:
    unet = network()
    engine = prepared(unet)
    tasks = [given(unet, batch, size) for batch in (1, 2) for size in ((16, 16), (8, 24))]
    quiet = [stepped(engine, *task) for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            crowded = list(pool.map(lambda task: stepped(engine, *task), tasks))
            assert all(torch.equal(a, b) for a, b in zip(crowded, quiet, strict=True))


def test_a_result_is_not_written_to_later() -> None:
    unet = network()
    engine = prepared(unet)
    x_BCHW, text_BLE, _ = given(unet)
    first = stepped(engine, x_BCHW, text_BLE, None)
    kept = first.clone()
    stepped(engine, x_BCHW + 1, text_BLE, None)
    assert torch.equal(first, kept)


def test_nothing_is_added_to_the_network() -> None:
    unet = network()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    layers = dict(unet.named_modules())
    stepped(prepared(unet), *given(unet))
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert dict(unet.named_modules()) == layers


def test_memory_for_shapes_seen_long_ago_is_given_back() -> None:
    unet = network()
    engine = prepared(unet)
    for side in (8, 12, 16, 20, 24):
        stepped(engine, *given(unet, 1, (side, side)))
    assert len(engine._programs) == 3


# --- weights that change


def changed_in_place(unet: nn.Module) -> None:
    for parameter in unet.parameters():
        parameter.mul_(1.1)


def changed_behind_torchs_back(unet: nn.Module) -> None:
    for parameter in unet.parameters():
        parameter.data.mul_(1.1)


def replaced(unet: nn.Module) -> None:
    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            module.weight = nn.Parameter(module.weight * 1.1, requires_grad=False)


def loaded(unet: nn.Module) -> None:
    unet.load_state_dict({name: tensor * 1.1 for name, tensor in unet.state_dict().items()})


def another_layer(unet: nn.Module) -> None:
    old = unet.get_submodule("mid_block.resnets.0.conv1")
    assert isinstance(old, nn.Conv2d)
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1).requires_grad_(False)
    unet.get_submodule("mid_block.resnets.0").conv1 = new


@pytest.mark.parametrize("change", [changed_in_place, changed_behind_torchs_back, replaced, loaded, another_layer])
@pytest.mark.parametrize("name", ["stage I", "upscaler"])
def test_changed_weights_are_packed_anew_at_the_next_reading(name: str, change: object) -> None:
    unet = network(name)
    engine = prepared(unet)
    inputs = given(unet)
    before = stepped(engine, *inputs)
    assert callable(change)
    change(unet)
    after = stepped(engine, *inputs)
    assert relative(after, stepped(unet, *inputs)) < EXACT
    assert relative(before, after) > 1e-3


def test_weights_changed_between_two_steps_are_followed() -> None:
    unet = network()
    engine = prepared(unet)
    x_BCHW, text_BLE, _ = given(unet)
    context = engine.read(text_BLE)
    before = engine.step(x_BCHW, 9, context)
    unet.conv_out.weight.mul_(2)
    unet.conv_out.bias.mul_(2)
    torch.testing.assert_close(engine.step(x_BCHW, 9, context), 2 * before)


# --- what it refuses


def test_lora_on_a_layer_is_refused_until_it_is_fused() -> None:
    unet = network()
    engine = prepared(unet)

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

    plain = unet.mid_block.attentions[0].to_q
    unet.mid_block.attentions[0].to_q = Wrapped(plain)
    for refused in (lambda: prepared(unet), lambda: stepped(engine, *given(unet))):
        with pytest.raises(EngineError, match=r"mid_block\.attentions\.0\.to_q .*LoRA has to be fused"):
            refused()
    unet.mid_block.attentions[0].to_q = plain
    assert relative(stepped(engine, *given(unet)), stepped(unet, *given(unet))) < EXACT


def test_other_precisions_are_refused() -> None:
    unet = network().to(torch.bfloat16)
    with pytest.raises(EngineError, match=r"torch\.bfloat16.*torch_dtype=torch\.float32"):
        stepped(prepared(unet), *given(unet))


def test_hooks_are_refused() -> None:
    unet = network()
    unet.conv_in.register_forward_hook(lambda *_: None)
    with pytest.raises(EngineError, match="conv_in has forward hooks"):
        prepared(unet)


def test_dropout_in_training_is_refused() -> None:
    unet = network()
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    prepared(unet)
    unet.train()
    with pytest.raises(EngineError, match=r"unet\.eval"):
        prepared(unet)


def test_inputs_that_the_network_refuses_are_refused() -> None:
    unet = network()
    engine = prepared(unet)
    x_BCHW, text_BLE, _ = given(unet)
    context = engine.read(text_BLE)
    with pytest.raises(ValueError, match=r"\[2, 3, H, W\]"):
        engine.step(x_BCHW[:1], 1, context)
    with pytest.raises(ValueError, match="multiples of 2"):
        engine.step(x_BCHW[..., :15], 1, context)
    with pytest.raises(ValueError, match=r"float32 on the CPU.*float64"):
        engine.step(x_BCHW.double(), 1, context)
    with pytest.raises(ValueError, match="no class embedding"):
        engine.read(text_BLE, torch.tensor([1, 1]))


def test_what_is_no_unet_of_ours_is_refused() -> None:
    with pytest.raises(TypeError, match="UNet2DConditionModel, got a Linear"):
        prepared(nn.Linear(1, 1))


def test_a_profile_names_the_kinds_of_work(compiled: Kernels) -> None:
    unet = network()
    engine: WinogradUNet = prepared(unet)
    x_BCHW, text_BLE, _ = given(unet)
    profile = engine.profile(x_BCHW, 1, engine.read(text_BLE))
    assert {"conv3", "norm", "linear", "attention"} <= profile.keys()
    assert all(seconds > 0 for seconds in profile.values())
