"""Weights in fewer bits: how near they stay, what they weigh, and that a network with them is moved like any other."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import pytest
import torch
from tests import tiny
from tests.hub_configs import UNET_ONE, UNET_THREE, UNET_TWO, VAE
from torch import Tensor, nn

from floyd.errors import ConfigError
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL
from floyd.runtime.placement import OneAtATime, device_of, send
from floyd.runtime.quantize import (
    QuantizedConv2d,
    QuantizedLinear,
    bytes_of,
    bytes_of_all,
    config_of,
    is_quantized,
    named_in,
    nbytes,
    prepare,
    quantization_of,
    quantize,
)
from floyd.runtime.schemes import SCHEMES, Kept

NEAR = {"int8": 0.01, "fp8": 0.03, "int4": 0.09}  # the error of weights of a normal distribution, relative
EACH = pytest.mark.parametrize("name", SCHEMES)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def keep(name: str, weight: Tensor) -> Kept:
    kept = Kept.room(SCHEMES[name].extents(tuple(weight.shape)), "cpu")
    SCHEMES[name].keep(weight, kept)
    return kept


def random_t5(seed: int, num_layers: int) -> Any:
    """Initialized as T5 is, not smaller than it takes for the errors to be those of many weights."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=128, d_model=128, d_kv=32, num_heads=4, d_ff=320, num_layers=num_layers,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    return T5EncoderModel(config).eval().requires_grad_(False)


def known(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if not key.startswith("_")}


@EACH
@pytest.mark.parametrize("shape", [(64, 96), (24, 40, 3, 3), (8, 33)], ids=str)
def test_a_weight_comes_back_nearly(name: str, shape: tuple[int, ...]) -> None:
    weight = seeded(*shape) * 10 ** seeded(shape[0], *[1] * (len(shape) - 1), seed=1)  # channels of all sizes
    kept = keep(name, weight)
    assert apart(SCHEMES[name].weight(kept, shape, torch.float32), weight) < NEAR[name]
    assert [tuple(part.shape) for part in kept] == [extent.shape for extent in SCHEMES[name].extents(shape)]
    assert [part.dtype for part in kept] == [extent.dtype for extent in SCHEMES[name].extents(shape)]


@EACH
def test_many_rows_are_worked_on_a_few_at_a_time_and_come_out_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = seeded(10, 64)
    whole = keep(name, weight)
    back = SCHEMES[name].weight(whole, weight.shape, torch.float32)
    monkeypatch.setattr("floyd.runtime.schemes._AT_ONCE", 3 * 64)
    parts = keep(name, weight)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(SCHEMES[name].weight(parts, weight.shape, torch.float32), back)


@EACH
def test_nothing_stays_nothing_and_extremes_stay_finite(name: str) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 1e30
    weight[2, 5] = -1e-30
    back = SCHEMES[name].weight(keep(name, weight), weight.shape, torch.float32)
    assert torch.equal(back[0], weight[0])
    assert apart(back[1], weight[1]) < NEAR[name]
    assert back.isfinite().all()


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_the_weight_its_codes_stand_for(name: str, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 48, bias=bias, dtype=dtype), nn.Conv2d(
        8, 12, 3, stride=2, padding=1, groups=2, bias=bias, dtype=dtype
    )  # fmt: skip
    few = quantize(nn.Sequential(copy.deepcopy(linear), copy.deepcopy(conv)), name)
    rounding = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for layer, plain, x in zip(few, (linear, conv), (seeded(5, 64), seeded(2, 8, 9, 9)), strict=True):
        plain.weight.data = layer.dequantized()
        assert layer(x.to(dtype)).dtype == dtype
        assert apart(layer(x.to(dtype)), plain(x.to(dtype))) < rounding


def test_large_sums_of_codes_do_not_overflow_in_half_precision() -> None:
    linear = nn.Linear(4096, 2, bias=False)
    linear.weight.data.fill_(0.5)
    layer = quantize(nn.Sequential(linear), "int8").half()
    assert layer(torch.ones(1, 4096).half()).tolist() == [[2048.0, 2048.0]]


def test_the_shape_of_a_layer_can_be_asked_for_as_before() -> None:
    linear, conv = quantize(nn.Sequential(nn.Linear(64, 48), nn.Conv2d(8, 12, 3, padding=1)), "int8")
    assert (linear.in_features, linear.out_features) == (64, 48)
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.padding) == (8, 12, (3, 3), (1, 1))
    assert linear.weight.shape == (48, 64)
    assert (linear.weight.dtype, linear.weight.device.type) == (torch.float32, "cpu")
    assert not isinstance(linear.weight, Tensor), "a T5 would cast its activations to the codes' dtype"
    assert apart(linear.weight.dequantized(), linear.dequantized()) == 0


@EACH
def test_casts_change_the_computation_and_not_what_is_kept(name: str) -> None:
    model = quantize(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 4)), name)
    before = {key: tensor.clone().view(torch.uint8) for key, tensor in model[0].state_dict().items() if key != "bias"}
    assert before.keys() == {"codes", "scale"}
    model.half().double().to(torch.bfloat16)
    send(model, dtype=torch.float16)
    assert model(seeded(1, 64).half()).dtype == torch.float16
    after = model[0].state_dict()
    assert all(torch.equal(after[key].view(torch.uint8), tensor) for key, tensor in before.items())
    assert model[0].like.numel() == 0


def test_a_quantized_network_visits_a_device_and_comes_home() -> None:
    """Unlike one that bitsandbytes quantized, it is offloaded as it is."""
    model = quantize(nn.Sequential(nn.Linear(64, 48)), "int8")
    codes = model[0].codes.clone()
    with OneAtATime(torch.device("meta")).use(model):
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
        assert [buffer.dtype for buffer in (model[0].codes, model[0].scale)] == [torch.int8, torch.float32]
    assert torch.equal(model[0].codes, codes), "what lay in main memory was not given up"
    assert device_of(quantize(nn.Sequential(nn.Linear(8, 8, bias=False)), "int4")).type == "cpu"


def test_gradients_pass_a_quantized_layer() -> None:
    """LoRA beside it can be trained."""
    model = quantize(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 4)), "int4")
    x = seeded(2, 64).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert {name for name, _ in model.named_parameters()} == {"0.bias", "1.bias"}


@pytest.mark.parametrize(("name", "least"), [("int8", 0.999), ("int4", 0.99)])
@pytest.mark.parametrize("seed", range(3))
def test_a_random_t5_says_nearly_the_same(name: str, least: float, seed: int) -> None:
    model, ids = random_t5(seed, num_layers=12 if name == "int8" else 2), torch.randint(0, 128, (2, 24))
    before = model(ids)[0]
    after = quantize(model, name)(ids)[0]
    assert float(torch.cosine_similarity(before, after, dim=-1).mean()) >= least
    assert quantization_of(model) == name


@EACH
def test_the_output_layers_of_t5_are_quantized_too(name: str) -> None:
    """The incumbent leaves them in float32; codes that are taken for numbers would ruin what passes here."""
    model = quantize(random_t5(0, 1), name)
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, QuantizedLinear)
    assert isinstance(model.shared, nn.Embedding)
    assert isinstance(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias, nn.Embedding)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_output_layers_of_t5_compute_in_float32_under_half(name: str) -> None:
    model = random_t5(0, 2)
    wo = [block.layer[1].DenseReluDense.wo for block in model.encoder.block]
    for layer in wo:
        layer.weight *= 2e4  # what leaves it no longer fits in float16
    few = quantize(copy.deepcopy(model), name)
    send(model, dtype=torch.float16)
    send(few, dtype=torch.float16)
    ids = torch.randint(0, 128, (1, 16))
    assert few.encoder.block[0].layer[1].DenseReluDense.wo.like.dtype == torch.float32
    before, after = model(ids)[0], few(ids)[0]
    assert after.isfinite().all()
    assert (
        float(torch.cosine_similarity(before.float(), after.float(), dim=-1).mean())
        > {"int8": 0.999, "int4": 0.96}[name]
    )


@EACH
@pytest.mark.parametrize("keys", [UNET_ONE, UNET_TWO, UNET_THREE], ids=["one", "two", "three"])
def test_a_unet_predicts_nearly_the_same(name: str, keys: dict[str, Any]) -> None:
    torch.manual_seed(0)
    unet = tiny.disturbed(UNet2DConditionModel(**known(keys)), 1)
    sides = 8 * unet.config.side_multiple
    labels = None if unet.class_embedding is None else torch.tensor([3])
    width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    told = (seeded(1, unet.config.in_channels, sides, sides), 500, seeded(1, 7, width), labels)
    with torch.no_grad():
        before = unet(*told).sample
        after = quantize(unet, name)(*told).sample
    assert apart(after, before) < {"int8": 0.03, "fp8": 0.15, "int4": 0.35}[name]
    precise = {name.split(".")[-1] for name, layer in unet.named_modules() if type(layer) is nn.Conv2d}
    assert precise == {"conv_in", "conv_out", "conv_shortcut"}
    assert any(isinstance(layer, QuantizedConv2d) for layer in unet.modules())


@EACH
def test_sizes_are_known_from_shapes_alone(name: str) -> None:
    for model in (
        random_t5(0, 2),
        *(UNet2DConditionModel(**known(keys)) for keys in (UNET_ONE, UNET_TWO, UNET_THREE)),
        AutoencoderKL(**known(VAE)),
        tiny.clip_text(),
    ):
        parameters = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
        for dtype in (torch.float32, torch.bfloat16):
            own = copy.deepcopy(model).to(dtype)
            rest = sum(b.nbytes for b in own.buffers())
            assert bytes_of_all(parameters, dtype) == nbytes(own) - rest
            assert bytes_of_all(parameters, dtype, name) == nbytes(quantize(own, name)) - rest


def test_the_size_of_t5_xxl_is_what_the_docs_promise() -> None:
    block = {f"{p}.layer.0.SelfAttention.{n}.weight": (4096, 4096) for n in "qkvo" for p in map(str, range(24))}
    for p in map(str, range(24)):
        block |= {f"{p}.layer.1.DenseReluDense.{n}.weight": (10240, 4096) for n in ("wi_0", "wi_1")}
        block |= {f"{p}.layer.1.DenseReluDense.wo.weight": (4096, 10240)}
    shapes = {**block, "shared.weight": (32128, 4096)}
    wide = {"in_float32": ("wo",)}
    in_gb = {
        (dtype, name): round(bytes_of_all(shapes, dtype, name, **wide) / 1e9, 1)
        for dtype in (torch.bfloat16, torch.float16)
        for name in (None, "int8", "int4")
    }
    assert in_gb == {
        (torch.bfloat16, None): 9.5, (torch.bfloat16, "int8"): 4.9, (torch.bfloat16, "int4"): 2.9,
        (torch.float16, None): 11.5, (torch.float16, "int8"): 4.9, (torch.float16, "int4"): 2.9,
    }  # fmt: skip


def test_the_size_of_a_single_weight_is_told_by_its_shape() -> None:
    assert bytes_of((10, 64), torch.bfloat16, None) == 10 * 64 * 2
    assert bytes_of((10, 64), torch.bfloat16, "int8") == bytes_of((10, 64), torch.bfloat16, "fp8") == 10 * 64 + 10 * 4
    assert bytes_of((10, 64), torch.bfloat16, "int4") == 10 * (32 + 2 * 2)
    assert bytes_of((10,), torch.bfloat16, "int4") == 20
    assert bytes_of((10, 64), torch.float32, "int8", key="shared.weight") == 4 * prod((10, 64))
    assert bytes_of((8, 3, 3, 3), torch.float32, "int8", key="conv_in.weight") == 4 * prod((8, 3, 3, 3))


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ValueError, match="one of int8, fp8, int4"):
        quantize(nn.Sequential(nn.Linear(8, 8)), "int3")
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        quantize(nn.Sequential(nn.GroupNorm(1, 8)), "int8")
    model = quantize(nn.Sequential(nn.Linear(8, 8)), "int8")
    with pytest.raises(ValueError, match="quantized already, as int8"):
        quantize(model, "int4")
    with pytest.raises(ValueError, match=r"shape \(8, 8\), got \(8, 4\)"):
        model[0].take(torch.zeros(8, 4))
    foreign = nn.Sequential(nn.Linear(8, 8))
    foreign.is_quantized = True  # type: ignore[assignment]
    assert is_quantized(foreign)
    with pytest.raises(ValueError, match="quantized already"):
        prepare(foreign, "int8")


def test_a_configuration_names_its_scheme() -> None:
    for name in SCHEMES:
        assert named_in({"quantization_config": config_of(name)}) == name
    assert named_in({}) is None
    with pytest.raises(ConfigError, match="'bitsandbytes', which floyd does not read"):
        named_in({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    with pytest.raises(ConfigError, match="another one wrote them"):
        named_in({"quantization_config": {**config_of("int4"), "version": 1}})
