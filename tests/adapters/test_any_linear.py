"""LoRA beside layers whose weight is theirs alone to read."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.adapters import lora_files
from tests.adapters.conftest import answer, reading, stage_one
from tests.adapters.lora_files import T5_LAYERS, Layers, made_up
from torch import Tensor, nn

from floyd import IFPipeline
from floyd.runtime.quantize import quantize


class Int8(nn.Module):
    """A linear layer of integers, which has nothing that is called `weight`."""

    def __init__(self, linear: nn.Linear, delta: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("whole", (weight / self.scale).round().to(torch.int8))
        self.bias, self.delta = linear.bias, delta  # what LoRA must amount to

    def forward(self, x: Tensor) -> Tensor:
        weight = self.whole.to(x.dtype) * self.scale.to(x.dtype)
        if self.delta is not None:
            weight = weight + self.delta.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


class Named(Int8):
    """The same with its integers under the usual name, and no word about its sides."""

    def __init__(self, linear: nn.Linear, delta: Tensor | None = None) -> None:
        super().__init__(linear, delta)
        del self.in_features, self.out_features
        self.register_buffer("weight", self.whole)


class Inherited(nn.Linear):
    """A linear layer by descent alone."""

    def __init__(self, linear: nn.Linear, delta: Tensor | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        inside = Int8(linear, delta)
        self.weight = nn.Parameter(inside.whole, requires_grad=False)
        self.bias, self.inside = linear.bias, inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


def quantized(network: Any, kind: Any, layers: Layers | None = None, strength: float = 1.0) -> Any:
    """A copy with every linear layer quantized; with `layers` added to what each computes."""
    copy = deepcopy(network)
    for name, layer in list(copy.named_modules()):
        if type(layer) is nn.Linear:
            lora = (layers or {}).get(name)
            copy.set_submodule(name, kind(layer, None if lora is None else strength * lora.delta))
    return copy


@pytest.mark.parametrize("kind", [Int8, Named, Inherited])
@pytest.mark.parametrize("name", lora_files.FORMATS)
def test_lora_acts_beside_a_quantized_layer(networks: dict[str, Any], name: str, kind: Any) -> None:
    layers = made_up(networks["one"], ranks=(2, 3))
    pipe = stage_one(quantized(networks["one"], kind))
    there, before = dict(pipe.unet.named_modules()), answer(pipe.unet)
    pipe.load_lora_weights(lora_files.FORMATS[name](layers))
    wanted = answer(quantized(networks["one"], kind, layers))
    assert (wanted - before).abs().max() > 1e-3
    torch.testing.assert_close(answer(pipe.unet), wanted, atol=1e-5, rtol=0)
    pipe.unload_lora_weights()
    assert torch.equal(answer(pipe.unet), before)
    assert all(layer is there[path] for path, layer in pipe.unet.named_modules())


def test_several_and_a_scale_by_the_call(networks: dict[str, Any], paint: Callable[..., Tensor]) -> None:
    one, two = made_up(networks["one"], seed=1), made_up(networks["one"], ("to_q", "conv1"), seed=2)
    pipe = stage_one(quantized(networks["one"], Int8))
    pipe.load_lora_weights(lora_files.peft(one), "one")
    pipe.load_lora_weights(lora_files.peft(two), "two")
    pipe.set_adapters("one")
    wanted = paint(stage_one(quantized(networks["one"], Int8, one, 0.5)))
    torch.testing.assert_close(paint(pipe, cross_attention_kwargs={"scale": 0.5}), wanted, atol=1e-5, rtol=0)
    pipe.set_adapters(["one", "two"], [0.5, 0.0])
    torch.testing.assert_close(paint(pipe), wanted, atol=1e-5, rtol=0)
    pipe.delete_adapters("two")
    torch.testing.assert_close(paint(pipe), wanted, atol=1e-5, rtol=0)


def test_a_quantized_t5_may_have_it_too(networks: dict[str, Any]) -> None:
    layers = made_up(networks["t5"], T5_LAYERS)
    pipe = stage_one(networks["one"], quantized(networks["t5"], Named))
    pipe.load_lora_weights(lora_files.kohya(layers, "text_encoder"))
    wanted = reading(quantized(networks["t5"], Named, layers))
    torch.testing.assert_close(reading(pipe.text_encoder), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [Int8, Named, Inherited])
def test_it_cannot_be_fused_and_nothing_is(networks: dict[str, Any], kind: Any) -> None:
    pipe = stage_one(quantized(networks["one"], kind))
    pipe.load_lora_weights(lora_files.peft(made_up(networks["one"], (*lora_files.ATTENTION, "conv1"))))
    before = answer(pipe.unet)
    with pytest.raises(ValueError, match="which is quantized"):
        pipe.fuse_lora()
    assert pipe.num_fused_loras == 0
    assert torch.equal(answer(pipe.unet), before)


def test_the_factors_have_the_precision_of_the_network(networks: dict[str, Any]) -> None:
    pipe: IFPipeline = stage_one(quantized(networks["one"].to(torch.bfloat16), Int8))
    pipe.load_lora_weights(lora_files.peft(made_up(networks["one"])))
    assert {p.dtype for name, p in pipe.unet.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert answer(pipe.unet.float()).dtype == torch.float32


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_lora_acts_beside_the_weights_that_floyd_quantizes(pipe: IFPipeline, name: str) -> None:
    """As it acts beside the same weights written out."""
    layers = made_up(pipe.unet)
    quantize(pipe.unet, name)
    plain = deepcopy(pipe.unet)
    for path in layers:
        stored = plain.get_submodule(path)
        linear = nn.Linear(stored.in_features, stored.out_features)
        linear.weight.data, linear.bias = stored.dequantized(), stored.bias
        plain.set_submodule(path, linear)
    before, wanted = answer(pipe.unet), answer(lora_files.merged(plain, (layers, 1.0)))
    pipe.load_lora_weights(lora_files.peft(layers))
    assert (wanted - before).abs().max() > 1e-3
    torch.testing.assert_close(answer(pipe.unet), wanted, atol=1e-5, rtol=0)
    pipe.unload_lora_weights()
    assert torch.equal(answer(pipe.unet), before)
