"""A network made ready for sampling says what it says otherwise, and nothing of it is ever stale or saved."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from tests.models.test_unet import TINY, VARIANTS, inputs, pair
from torch import Tensor, nn

from floyd.models import unet_told
from floyd.models.unet import UNet2DConditionModel
from floyd.models.unet_told import Timetable
from floyd.runtime.switches import Switches

NAMES = [field.name for field in fields(Switches) if field.name not in ("read_once", "compiled", "graphs")]
ALONE = {name: Switches(**{"read_once": True, name: True}) for name in NAMES}
SWITCHES = {**ALONE, "all": Switches.on(), "gpu": Switches.best_for("cuda")}
TIMESTEPS = (900, 321, 40)


def told(config: dict[str, Any], **options: Any) -> tuple[UNet2DConditionModel, Tensor, dict[str, Any]]:
    network, given = pair(config)[0], inputs(config, **options)
    sample = given.pop("sample")
    return network, sample, {"text_BLE": given["encoder_hidden_states"], "class_labels": given.get("class_labels")}


def painted(network: UNet2DConditionModel, sample: Tensor, given: dict[str, Any], switches: Switches) -> list[Tensor]:
    timesteps = TIMESTEPS if switches.time_table else ()
    with torch.no_grad():
        context = network.read(**given, ready=network.ready(switches), timesteps=timesteps)
        return [network.step(sample, t, context) for t in TIMESTEPS]


def plainly(network: UNet2DConditionModel, sample: Tensor, given: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        context = network.read(**given)
        return [network.step(sample, t, context) for t in TIMESTEPS]


@pytest.mark.parametrize(
    ("name", "switch"),
    [*((name, switch) for name in TINY for switch in SWITCHES), *((name, "all") for name in VARIANTS)],
)
def test_every_switch_leaves_the_prediction(name: str, switch: str) -> None:
    asked = told({**TINY, **VARIANTS}[name])
    got = painted(*asked, SWITCHES[switch])
    torch.testing.assert_close(got, plainly(*asked), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("stage II", (8, 20)), ("x4", (18, 13))])
def test_a_picture_need_not_be_square(name: str, size: tuple[int, int]) -> None:
    asked = told(TINY[name], size=size, batch=3)
    torch.testing.assert_close(painted(*asked, Switches.on()), plainly(*asked), atol=1e-5, rtol=1e-5)


def test_a_time_that_was_not_promised_and_one_for_each_image_are_answered_too() -> None:
    network, sample, given = told(TINY["stage I"])
    with torch.no_grad():
        context = network.read(**given, ready=network.ready(Switches.on()), timesteps=TIMESTEPS)
        plain = network.read(**given)
        for t in (7, torch.tensor(500), torch.tensor([3, 700]), 0.5):
            expected = network.step(sample, t, plain)
            torch.testing.assert_close(network.step(sample, t, context), expected, atol=1e-5, rtol=1e-5)


def test_a_timetable_holds_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def says(timesteps: Any) -> Tensor:
        asked.append(tuple(timesteps))
        return torch.tensor(timesteps).view(-1, 1, 1).expand(-1, 2, 8).float()

    table = Timetable((9, 8, 8, 7, 6, 5), says)
    monkeypatch.setattr(unet_told, "MOST_TABLE_BYTES", 3 * 2 * 8 * 4)
    assert [int(table.row(t)[0, 0]) for t in (9, 8, 8, 7, 6, 5, 9, 4)] == [9, 8, 8, 7, 6, 5, 9, 4]
    assert asked == [(9,), (8, 7, 6), (5,), (9, 8, 7), (4,)]


@pytest.mark.parametrize("name", TINY)
def test_what_is_saved_is_what_was_loaded(name: str) -> None:
    network, sample, given = told(TINY[name])
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    modules = dict(network.named_modules())
    painted(network, sample, given, Switches.on())
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert dict(network.named_modules()) == modules


@pytest.mark.parametrize("name", TINY)
def test_a_weight_that_changes_is_noticed_and_followed_by_the_next_picture(name: str) -> None:
    network, sample, given = told(TINY[name])
    ready = network.ready(Switches.on())
    assert ready is not None
    for key, parameter in network.named_parameters():
        assert ready.is_current
        with torch.no_grad():
            parameter.mul_(1.5)
        assert not ready.is_current, key
        ready = network.ready(Switches.on())
        assert ready is not None
    torch.testing.assert_close(
        painted(network, sample, given, Switches.on()), plainly(network, sample, given), atol=1e-4, rtol=1e-4
    )


def test_changes_that_no_counter_sees_are_followed_by_the_next_picture() -> None:
    network, sample, given = told(TINY["stage I"])
    first = painted(network, sample, given, Switches.on())
    for parameter in network.parameters():
        parameter.data.mul_(1.1)
    second = painted(network, sample, given, Switches.on())
    assert (second[0] - first[0]).abs().max() > 1e-3
    torch.testing.assert_close(second, plainly(network, sample, given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_of_the_plain_network(name: str) -> None:
    network, sample, given = told(TINY[name])
    gradients = []
    for ready in (None, network.ready(Switches.on())):
        network.zero_grad()
        context = network.read(**given, ready=ready, timesteps=TIMESTEPS)
        with torch.no_grad():
            network.step(sample, 321, context)  # what is remembered of sampling is not learned from
        network.step(sample, 321, context).square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in network.named_parameters()})
    assert all(gradient is not None for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


def test_a_network_that_is_watched_anywhere_is_left_as_it_is() -> None:
    network = pair(TINY["stage I"])[0]
    seen: list[nn.Module] = []
    handle = network.mid_block.attentions[0].to_k.register_forward_hook(lambda module, *_: seen.append(module))
    assert network.ready(Switches.on()) is None
    handle.remove()
    assert network.ready(Switches.on()) is not None


@pytest.mark.parametrize("target", ["to_q", "to_v", "conv1", "conv2", "time_emb_proj", "add_k_proj"])
def test_what_lora_adapts_takes_part(target: str) -> None:
    peft = pytest.importorskip("peft")
    network, sample, given = told(TINY["stage I"])
    before = painted(network, sample, given, Switches.on())
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False), network)
    network.eval()
    adapted = painted(network, sample, given, Switches.on())
    torch.testing.assert_close(adapted, plainly(network, sample, given), atol=1e-5, rtol=1e-5)
    assert (adapted[0] - before[0]).abs().max() > 1e-3


def test_bfloat16_stays_so_and_near() -> None:
    network, sample, given = told(TINY["stage II"])
    exact = plainly(network, sample, given)[1]
    network.bfloat16()
    halved = {key: None if x is None else x.bfloat16() if x.is_floating_point() else x for key, x in given.items()}
    half = painted(network, sample.bfloat16(), halved, Switches.on())[1]
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).pow(2).mean() < 1e-3 * exact.pow(2).mean()


def test_a_call_takes_what_was_read_instead_of_a_text() -> None:
    network, sample, given = told(TINY["stage I"])
    with torch.no_grad():
        context = network.read(**given)
        expected = network(sample, 5, given["text_BLE"]).sample
        assert torch.equal(network(sample, 5, context=context).sample, expected)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        network(sample, 5)
