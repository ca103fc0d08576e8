from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.adapters import lora_files
from tests.adapters.conftest import answer, reading
from tests.adapters.lora_files import made_up, merged
from torch import Tensor

from floyd import IFPipeline
from floyd.adapters import fused
from floyd.store.weights import without_adapters


def weights(network: Any) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in without_adapters(network).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.fixture
def two(pipe: IFPipeline) -> IFPipeline:
    """With two LoRAs, both of which act."""
    t5 = lora_files.peft(made_up(pipe.text_encoder, ("q", "wo")), "text_encoder")
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet, ranks=(2, 3), seed=1)) | t5, "one")
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet, ("to_q", "conv1"), seed=2)), "two")
    pipe.set_adapters(["one", "two"], [0.7, 1.3])
    return pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_fused_comes_out_to_the_bit(two: IFPipeline, dtype: torch.dtype) -> None:
    two.to(dtype)
    before = weights(two.unet) | weights(two.text_encoder)
    two.fuse_lora()
    assert not same(weights(two.unet) | weights(two.text_encoder), before)
    two.unfuse_lora()
    assert same(weights(two.unet) | weights(two.text_encoder), before)


def test_fused_lora_acts_as_it_did(two: IFPipeline) -> None:
    before = answer(two.unet), reading(two.text_encoder)
    two.fuse_lora()
    assert (two.num_fused_loras, two.fused_loras) == (2, {"one", "two"})
    close(answer(two.unet), before[0])
    close(reading(two.text_encoder), before[1])
    two.unfuse_lora()
    assert two.num_fused_loras == 0
    assert torch.equal(answer(two.unet), before[0])


def test_a_component_a_scale_and_names_may_be_chosen(pipe: IFPipeline) -> None:
    one, other = made_up(pipe.unet, seed=1), made_up(pipe.unet, seed=2)
    plain, t5 = deepcopy(pipe.unet), reading(pipe.text_encoder)
    pipe.load_lora_weights(
        lora_files.peft(one) | lora_files.peft(made_up(pipe.text_encoder, ("q",)), "text_encoder"), "one"
    )
    pipe.load_lora_weights(lora_files.peft(other), "other")
    pipe.fuse_lora(components=["unet"], lora_scale=0.5, adapter_names=["one"])
    close(answer(pipe.unet), answer(merged(plain, (one, 0.5))))
    pipe.fuse_lora(components="unet", adapter_names=["other"])
    close(answer(pipe.unet), answer(merged(plain, (one, 0.5), (other, 1.0))))
    assert pipe.fused_loras == {"one", "other"}
    pipe.unfuse_lora(components=["text_encoder"])
    assert pipe.num_fused_loras == 2
    pipe.unfuse_lora()
    assert same(weights(pipe.unet), weights(plain))
    assert torch.equal(reading(pipe.text_encoder), t5)


def test_beside_fused_lora_nothing_else_can_be_chosen(two: IFPipeline) -> None:
    two.fuse_lora()
    for call in (
        lambda: two.set_adapters("one"),
        lambda: two.delete_adapters("one"),
        lambda: two.load_lora_weights({}),
        two.disable_lora,
    ):
        with pytest.raises(ValueError, match=r"one, two is fused into the weights.*unfuse_lora\(\) first"):
            call()


def test_unloading_keeps_what_is_fused(two: IFPipeline) -> None:
    before = answer(two.unet)
    two.fuse_lora()
    two.unload_lora_weights()
    close(answer(two.unet), before)
    assert two.get_list_adapters() == {}
    assert not any(hasattr(layer, "base_layer") for layer in two.unet.modules())
    two.unfuse_lora()  # nothing is left to take out
    close(answer(two.unet), before)


def test_the_tensors_that_were_there_are_never_written_into(pipe: IFPipeline) -> None:
    """They may be a file's memory map, or another network's."""
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)))
    weight = pipe.unet.mid_block.attentions[0].to_q.weight
    there, copy = weight.data, weight.data.clone()
    pipe.fuse_lora()
    assert torch.equal(there, copy)
    assert weight.data_ptr() != there.data_ptr()
    pipe.unfuse_lora()
    assert weight.data_ptr() == there.data_ptr()


def test_safe_fusing_refuses_what_is_not_finite_and_fuses_nothing(pipe: IFPipeline) -> None:
    layers = made_up(pipe.unet)
    last = list(layers)[-1]
    layers[last] = layers[last]._replace(up=torch.full_like(layers[last].up, 3e38))
    pipe.load_lora_weights(lora_files.peft(layers))
    before = weights(pipe.unet)
    with pytest.raises(ValueError, match=rf"weights of {last} would not be finite; nothing was fused"):
        pipe.fuse_lora(lora_scale=100.0, safe_fusing=True)
    assert pipe.num_fused_loras == 0
    assert same(weights(pipe.unet), before)
    assert not any(fused._KEPT in layer.__dict__ for layer in pipe.unet.modules())


def test_fusing_nothing_is_refused(pipe: IFPipeline) -> None:
    with pytest.raises(ValueError, match="no LoRA that acts on unet, text_encoder"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match="components must be some of unet, text_encoder, got vae"):
        pipe.fuse_lora(components=["unet", "vae"])
    with pytest.raises(ValueError, match="got none"):
        pipe.unfuse_lora(components=[])
    pipe.load_lora_weights(lora_files.peft(made_up(pipe.unet)))
    with pytest.raises(ValueError, match="lora_scale must be a finite number"):
        pipe.fuse_lora(lora_scale=float("inf"))


def test_a_cast_in_between_is_kept(two: IFPipeline) -> None:
    before = weights(two.unet)
    two.fuse_lora()
    two.to(torch.bfloat16)
    two.unfuse_lora()
    assert same(weights(two.unet), {key: tensor.to(torch.bfloat16) for key, tensor in before.items()})


def test_what_peft_itself_fused_is_taken_out_up_to_rounding(two: IFPipeline, caplog: Any) -> None:
    before = answer(two.unet)
    for _, layer in fused.lora_layers(two.unet):
        layer.merge(adapter_names=["one"])
    two.unfuse_lora()
    assert "only up to rounding" in caplog.text
    close(answer(two.unet), before)
