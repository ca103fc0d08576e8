"""What the formulas say is what a traced pass holds and does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.live import counted

from floyd.models.configs import PRESETS, UNetConfig
from floyd.models.costs import decoder_cost, encoder_cost, unet_cost
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL
from floyd.store.pretrained import parameters_on_meta

META = torch.device("meta")
SMALL: dict[str, dict[str, Any]] = {
    "stage I": {**PRESETS["IF-I-M"], "block_out_channels": (64, 128, 192), "cross_attention_dim": 192,
                "down_block_types": PRESETS["IF-I-M"]["down_block_types"][:3],
                "up_block_types": PRESETS["IF-I-M"]["up_block_types"][1:], "layers_per_block": 1},
    "stage II": {**PRESETS["IF-II-M"], "block_out_channels": (32, 64, 128), "layers_per_block": (1, 1, 2),
                 "down_block_types": PRESETS["IF-II-M"]["down_block_types"][2:],
                 "up_block_types": PRESETS["IF-II-M"]["up_block_types"][:3], "cross_attention_dim": 128,
                 "time_embedding_dim": 128},
    "stage III": {**PRESETS["x4-upscaler"], "block_out_channels": (64, 128, 128, 256), "layers_per_block": 1,
                  "cross_attention_dim": 64},
}  # fmt: skip


def traced(config: dict[str, Any], side: int) -> tuple[int, float]:
    """Bytes at the worst moment and operations of one step, in float16."""
    with parameters_on_meta():
        network = UNet2DConditionModel(**config).to(META, torch.float16).eval()
    width = network.config.encoder_hid_dim or network.config.cross_attention_dim
    text = torch.empty(1, 77, width, dtype=torch.float16, device=META)
    label = None if network.class_embedding is None else torch.zeros(1, dtype=torch.long, device=META)
    x = torch.empty(1, network.config.in_channels, side, side, dtype=torch.float16, device=META)
    with counted() as (live, flops):
        context = network.read(text, label)
        reading, live.peak = flops.total, live.now
        network.step(x, torch.zeros((), device=META), context)
    return live.peak, flops.total - reading


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("side", [32, 64])
def test_a_unet_holds_what_the_formula_says(name: str, side: int) -> None:
    peak_bytes, flops = traced(SMALL[name], side)
    cost = unet_cost(UNetConfig.from_json(SMALL[name]), side, side)
    assert 2 * cost.numbers == pytest.approx(peak_bytes, rel=0.03)
    assert cost.flops == pytest.approx(flops, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_the_published_networks_hold_what_the_formula_says(name: str) -> None:
    side = {"x4-upscaler": 256}.get(name, PRESETS[name]["sample_size"])
    peak_bytes, flops = traced(PRESETS[name], side)
    cost = unet_cost(UNetConfig.from_json(PRESETS[name]), side, side)
    assert 2 * cost.numbers == pytest.approx(peak_bytes, rel=0.03)
    assert cost.flops == pytest.approx(flops, rel=0.01)


def test_a_decoder_holds_what_the_formula_says() -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    with parameters_on_meta():
        vae = AutoencoderKL(**blocks, block_out_channels=(32, 64, 128), layers_per_block=2).to(META, torch.float16)
    with counted() as (live, flops):
        vae.decode(torch.empty(1, 4, 64, 64, dtype=torch.float16, device=META))
    cost = decoder_cost(vae.config, 64, 64)
    assert 2 * cost.numbers == pytest.approx(live.peak, rel=0.03)
    assert cost.flops == pytest.approx(flops.total, rel=0.03)


def test_t5_xxl_reads_a_text_with_the_operations_that_were_counted() -> None:
    """Of the whole network in float32, by torch's counter: 1431 GFLOP for two texts of 77 tokens."""
    config = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
    assert 2 * encoder_cost(config, num_tokens=77).flops == pytest.approx(1431e9, rel=0.02)
