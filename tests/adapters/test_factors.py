from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.adapters import lora_files
from torch import nn

from floyd.adapters.factors import Factors, LoraFile, Shape, layer_shapes, read_layers, shape_of, sorted_out
from floyd.errors import CheckpointError

Q = "unet.mid_block.attentions.0.to_q"


@pytest.fixture
def unet(networks: dict[str, Any]) -> Any:
    return networks["one"]


def refused(state: dict[str, Any], match: str, **networks: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        sorted_out(LoraFile(state), networks)
    assert "nothing of it was" in str(caught.value)


@pytest.mark.parametrize("name", lora_files.FORMATS)
def test_every_layer_of_every_format_arrives(unet: Any, name: str) -> None:
    layers = lora_files.made_up(unet, ranks=(1, 2, 5))
    found = sorted_out(LoraFile(lora_files.FORMATS[name](layers)), {"unet": unet, "text_encoder": None})["unet"]
    assert found.keys() == layers.keys()
    for path, factors in found.items():
        assert torch.equal(factors.down, layers[path].down)
        assert torch.equal(factors.up, layers[path].up)
        assert factors.scale == 1


def test_formats_may_be_mixed_key_by_key(unet: Any) -> None:
    layers = lora_files.made_up(unet)
    formats = [write(layers) for write in lora_files.FORMATS.values() if write is not lora_files.kohya]
    pairs = zip(*(list(state.items()) for state in formats[:2]), strict=True)
    state = dict(pair[i % 2] for i, pair in enumerate(pairs))
    assert {key.split(".")[-2] for key in state} == {"lora_A", "up"}
    assert sorted_out(LoraFile(state), {"unet": unet})["unet"].keys() == layers.keys()


def test_keys_that_name_no_component_find_the_one_with_the_layer(networks: dict[str, Any]) -> None:
    unet, t5 = networks["one"], networks["t5"]
    state = lora_files.peft(lora_files.made_up(unet)) | lora_files.peft(lora_files.made_up(t5, ("wo",)), "text_encoder")
    bare = {key.partition(".")[2]: tensor for key, tensor in state.items()}
    found = sorted_out(LoraFile(bare), {"unet": unet, "text_encoder": t5})
    assert {component: len(own) for component, own in found.items()} == {"unet": 24, "text_encoder": 2}


def test_what_is_for_an_absent_network_is_left_out(networks: dict[str, Any]) -> None:
    t5 = lora_files.peft(lora_files.made_up(networks["t5"], ("wo",)), "text_encoder")
    assert sorted_out(LoraFile(t5), {"unet": networks["one"], "text_encoder": None}) == {}


def test_alpha_is_taken_from_the_file_and_then_from_what_is_told(unet: Any) -> None:
    layers = lora_files.made_up(unet, ("to_q", "to_k"), ranks=(4,), alpha=2.0)
    queries = {name: lora for name, lora in layers.items() if name.endswith("to_q")}
    state = lora_files.kohya(queries) | lora_files.peft({n: lo for n, lo in layers.items() if n not in queries})
    told = {"lora_alpha": 12, "alpha_pattern": {"^mid_block.*": 1, "up_blocks.0.attentions.0.to_k": 3}}
    found = sorted_out(LoraFile(state, configs={"unet": told}), {"unet": unet})["unet"]
    scales = {name: factors.scale for name, factors in found.items()}
    assert {scales[name] for name in queries} == {0.5}
    assert scales["mid_block.attentions.0.to_k"] == 0.25
    assert scales["up_blocks.0.attentions.0.to_k"] == 0.75
    assert scales["up_blocks.0.attentions.1.to_k"] == 3
    by_root = LoraFile(state, configs={None: {"lora_alpha": 12, "use_rslora": True}})
    assert sorted_out(by_root, {"unet": unet})["unet"]["mid_block.attentions.0.to_k"].scale == 6


def test_baking_alpha_in_changes_nothing_but_who_knows_it() -> None:
    factors = Factors(torch.randn(4, 3), torch.randn(5, 4), alpha=6.0)
    baked = factors.baked()
    assert baked.scale == 1
    torch.testing.assert_close(baked.up @ baked.down, 1.5 * factors.up @ factors.down)
    assert factors.baked().baked().up is not factors.up
    plain = Factors(factors.down, factors.up, 4.0)
    assert plain.baked() is plain


def test_a_key_that_nothing_uses_is_named(unet: Any) -> None:
    good = lora_files.peft(lora_files.made_up(unet))
    refused(good | {"unet.mid_block.attentions.0.to_x.lora_A.weight": torch.ones(2, 2)},
            "nothing here uses unet.mid_block.attentions.0.to_x.lora_A.weight .*nearest layer here is mid_block",
            unet=unet)  # fmt: skip
    refused(good | {f"{Q}.lora_magnitude_vector": torch.ones(2)}, "lora_magnitude_vector.*DoRA", unet=unet)
    refused({"banana": torch.ones(2)}, "nothing here uses banana", unet=unet)


def test_many_bad_keys_are_counted(unet: Any) -> None:
    state = {f"unet.x{i}.lora_A.weight": torch.ones(1, 1) for i in range(40)}
    refused(state, "and 37 more", unet=unet)


def test_a_factor_without_its_partner_is_named(unet: Any) -> None:
    state = lora_files.peft(lora_files.made_up(unet))
    del state[f"{Q}.lora_B.weight"]
    refused(state, f"{Q} has its down alone", unet=unet)
    refused({f"{Q}.alpha": torch.tensor(1.0)}, f"{Q} has its alpha alone", unet=unet)


@pytest.mark.parametrize(
    ("down", "up", "complaint"),
    [
        ((2, 64), (64, 3), "do not have one rank"),
        ((0, 64), (64, 0), "do not have one rank"),
        ((2, 64, 3, 3), (64, 2, 1, 1), "64 inputs and 64 outputs: they are for another stage"),
        ((2, 32), (32, 2), "64 inputs and 64 outputs: they are for another stage"),
        ((2,), (64, 2), "do not have one rank"),
    ],
)
def test_factors_that_do_not_fit_are_named(unet: Any, down: Any, up: Any, complaint: str) -> None:
    refused({f"{Q}.lora_A.weight": torch.ones(down), f"{Q}.lora_B.weight": torch.ones(up)}, complaint, unet=unet)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (torch.full((2, 64), float("nan")), "not finite"),
        (torch.ones(2, 64, dtype=torch.int8), "tensor of floats, got torch.int8"),
        ([1.0], "must be a tensor, got a list"),
    ],
)
def test_a_tensor_that_cannot_be_a_factor_is_named(unet: Any, bad: Any, complaint: str) -> None:
    refused({f"{Q}.lora_A.weight": bad, f"{Q}.lora_B.weight": torch.ones(64, 2)}, complaint, unet=unet)


def test_alpha_is_one_finite_number(unet: Any) -> None:
    for alpha in (torch.ones(2), torch.tensor(float("inf"))):
        refused({f"{Q}.alpha": alpha}, "must be one finite number", unet=unet)


def test_one_factor_given_twice_is_named(unet: Any) -> None:
    state = lora_files.peft(lora_files.made_up(unet)) | {f"{Q}.lora.down.weight": torch.ones(2, 64)}
    refused(state, f"{Q}.lora.down.weight is the second down factor of {Q}", unet=unet)


def test_the_file_of_a_stage_two_is_refused_by_a_stage_one(networks: dict[str, Any]) -> None:
    layers = lora_files.made_up(networks["two"], (*lora_files.ATTENTION, "time_emb_proj"))
    refused(lora_files.peft(layers), "another stage or size of IF|nothing here uses", unet=networks["one"])


def test_another_kind_of_adapter_is_refused_by_what_it_says_of_itself() -> None:
    with pytest.raises(CheckpointError, match="is DoRA for unet"):
        LoraFile({}, configs={"unet": {"use_dora": True}})
    with pytest.raises(CheckpointError, match="is LOHA"):
        LoraFile({}, configs={None: {"peft_type": "LOHA"}})


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 5), Shape(3, 5)),
        (nn.Conv2d(3, 5, (1, 3)), Shape(3, 5, (1, 3))),
        (nn.Conv2d(4, 8, 3, groups=2), None),
        (nn.Embedding(3, 5), None),
        (nn.LayerNorm(5), None),
        (nn.Sequential(nn.Linear(3, 5)), None),
    ],
)
def test_a_layer_says_what_it_takes_and_gives(layer: nn.Module, shape: Shape | None) -> None:
    assert shape_of(layer) == shape


def test_every_linear_layer_and_convolution_can_have_lora(unet: Any) -> None:
    there = {name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert {name for name, _ in layer_shapes(unet)} == there


@pytest.mark.parametrize("write", [lora_files.peft, lora_files.mid_2023, lora_files.mixed, lora_files.spring_2023])
def test_a_trainers_layers_are_read_without_a_network(unet: Any, write: Any) -> None:
    layers = lora_files.made_up(unet)
    state = {key.removeprefix("unet."): tensor for key, tensor in write(layers).items()}
    assert read_layers(state, "unet_lora_layers").keys() == layers.keys()


def test_a_trainers_layers_are_checked(unet: Any) -> None:
    with pytest.raises(TypeError, match="unet_lora_layers must be a state dict or a module, got a list"):
        read_layers([], "unet_lora_layers")
    with pytest.raises(ValueError, match=r"conv_in\.weight is no factor of LoRA: it looks like a weight"):
        read_layers(unet, "unet_lora_layers")
    with pytest.raises(ValueError, match="x has its down alone"):
        read_layers({"x.lora_A.weight": torch.ones(1, 1)}, "unet_lora_layers")
