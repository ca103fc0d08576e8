"""Networks that are quantized as they are read: as if quantized afterwards, in less memory; and back from disk."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.hub_configs import UNET_ONE, VAE
from tests.store.conftest import Toy, same

from floyd.errors import CheckpointError
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL
from floyd.runtime.quantize import Quantized, nbytes, quantization_of, quantize
from floyd.store import lazy, weights
from floyd.store.components import load_component, save_component

T5 = ("text_encoder", "transformers", "T5EncoderModel")
CLIP = ("text_encoder", "transformers", "CLIPTextModel")
NAMES = ("int8", "fp8", "int4")
EACH = pytest.mark.parametrize("name", NAMES)


def known(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if not key.startswith("_")}


@pytest.fixture
def unet(tmp_path: Path) -> UNet2DConditionModel:
    model = tiny.disturbed(UNet2DConditionModel(**known(UNET_ONE)), 1)
    model.save_pretrained(tmp_path / "plain", max_shard_size="200KB")
    return model


@EACH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_quantized_on_load_is_the_one_quantized_afterwards(
    unet: UNet2DConditionModel, tmp_path: Path, name: str, dtype: str
) -> None:
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "plain", dtype=dtype, quantization=name)
    assert quantization_of(loaded) == name
    assert same(loaded, quantize(unet, name).to(getattr(torch, dtype)))
    assert loaded.dtype == getattr(torch, dtype)
    assert not loaded.training
    assert all(part.like.dtype == loaded.dtype for part in loaded.modules() if isinstance(part, Quantized))
    told = (torch.zeros(1, 3, 32, 32), 5, torch.zeros(1, 4, 32))
    told = (told[0].to(loaded.dtype), told[1], told[2].to(loaded.dtype))
    assert torch.equal(loaded(*told).sample, unet(*told).sample)


@EACH
@pytest.mark.parametrize("safe", [True, False])
def test_a_quantized_network_goes_to_disk_and_back(
    unet: UNet2DConditionModel, tmp_path: Path, name: str, safe: bool
) -> None:
    quantize(unet, name).save_pretrained(tmp_path / "few", safe_serialization=safe, max_shard_size="100KB")
    told = json.loads((tmp_path / "few" / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["weights"]) == ("floyd", name)
    for asked in (None, name):
        again = UNet2DConditionModel.from_pretrained(tmp_path / "few", quantization=asked)
        assert same(again, unet)
        assert "quantization_config" not in again.config
    half = UNet2DConditionModel.from_pretrained(tmp_path / "few", dtype=torch.bfloat16)
    assert same(half, unet.to(torch.bfloat16))
    with pytest.raises(ValueError, match=f"is kept as {name} and cannot become"):
        UNet2DConditionModel.from_pretrained(tmp_path / "few", quantization=NAMES[NAMES.index(name) - 1])


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_t5_is_quantized_on_load_and_comes_back_from_disk(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = tiny.t5()
    save_component(model, tmp_path / "plain", "text_encoder", max_shard_size="20KB")
    loaded = load_component(tmp_path / "plain", *T5, torch_dtype=dtype, quantization=name)
    reference = quantize(load_component(tmp_path / "plain", *T5), name)
    assert loaded.shared.weight.dtype == dtype
    assert not loaded.training
    codes = {key: tensor for key, tensor in loaded.state_dict().items() if key.endswith((".codes", ".scale"))}
    assert len(codes) == 2 * 2 * 7
    assert all(_bits(tensor) == _bits(reference.state_dict()[key]) for key, tensor in codes.items())
    if dtype == torch.float16:
        assert loaded.encoder.block[1].layer[1].DenseReluDense.wo.like.dtype == torch.float32

    save_component(loaded, tmp_path / "few", "text_encoder", max_shard_size="5KB")
    again = load_component(tmp_path / "few", *T5, torch_dtype=dtype)
    assert _same_bits(again, loaded)
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids)[0], loaded(ids)[0])
    assert (tmp_path / "few" / "text_encoder" / "model.safetensors.index.json").is_file()


def _bits(tensor: torch.Tensor) -> list[int]:
    return list(tensor.flatten().view(torch.uint8).tolist())


def _same_bits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(_bits(one[key]) == _bits(two[key]) for key in one)


@EACH
def test_clip_and_the_autoencoder_can_be_quantized_too(tmp_path: Path, name: str) -> None:
    save_component(tiny.clip_text(), tmp_path, "text_encoder")
    tiny.disturbed(AutoencoderKL(**known(VAE)), 2).save_pretrained(tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae", quantization=name)
    clip = load_component(tmp_path, *CLIP, quantization=name)
    assert quantization_of(vae) == quantization_of(clip) == name
    assert vae.decode(torch.zeros(1, 4, 4, 4)).sample.isfinite().all()
    save_component(clip, tmp_path / "few", "text_encoder")
    assert _same_bits(load_component(tmp_path / "few", *CLIP), clip)


def test_a_toy_without_room_for_it_is_read_exactly(toy: Toy, tmp_path: Path) -> None:
    """Stored buffers keep their bytes, and a network's own weights that no layer holds their precision."""
    toy.save_pretrained(tmp_path)
    loaded = Toy.from_pretrained(tmp_path, quantization="int8")
    assert torch.equal(loaded.mark, toy.mark)
    assert torch.equal(loaded.scale, toy.scale)
    assert torch.equal(loaded.ramp, toy.ramp)


def test_files_that_do_not_fit_are_refused(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    state = dict(unet.state_dict())
    key = "mid_block.resnets.0.conv1.weight"

    def refused(changed: dict[str, Any], words: str) -> None:
        weights.write(changed, tmp_path / "plain")
        with pytest.raises(CheckpointError, match=words):
            UNet2DConditionModel.from_pretrained(tmp_path / "plain", quantization="int8")

    refused({k: v for k, v in state.items() if k != key}, f"missing: {key}")
    refused({**state, "more": torch.zeros(1)}, "unexpected: more")
    refused({**state, key: torch.zeros(2, 2)}, r"conv1.weight is \(2, 2\), expected")
    refused({**state, key: state[key].to(torch.int8)}, "is quantized: mid_block")
    few = quantize(unet, "int8").state_dict()
    codes = key.replace("weight", "codes")
    unet.save_pretrained(tmp_path / "plain")
    refused({**few, codes: few[codes].float()}, "expected torch.int8")
    with pytest.raises(ValueError, match="one of int8, fp8, int4"):
        UNet2DConditionModel.from_pretrained(tmp_path / "plain", quantization="int7")


def test_what_others_quantized_is_refused_by_name(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    path = tmp_path / "plain" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(ValueError, match="quantized by 'torchao'"):
        UNet2DConditionModel.from_pretrained(tmp_path / "plain")


def test_only_one_weight_at_a_time_is_in_memory_in_full(
    unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, alive, most = lazy.Lying.read, weakref.WeakSet[torch.Tensor](), []

    def watched(self: lazy.Lying) -> torch.Tensor:
        tensor = read(self)
        if tensor.ndim in (2, 4):
            alive.add(tensor)
            most.append(len(alive))
        return tensor

    monkeypatch.setattr(lazy.Lying, "read", watched)
    model = UNet2DConditionModel.from_pretrained(tmp_path / "plain", quantization="int8")
    kept = sum(p.ndim in (2, 4) for p in model.parameters())  # as they were read: in float32 already
    assert len(most) == sum(p.ndim in (2, 4) for p in unet.parameters())
    assert max(most) <= kept + 2, "the next is read before the name of the last one is given up"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_cast_is_let_go_before_the_next_weight_is_looked_at(
    unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A mapped file's pages count as long as somebody holds them; where nothing is cast they are the weights."""
    mapped, alive, most = lazy.Lying.mapped, weakref.WeakSet[torch.Tensor](), []

    def watched(self: lazy.Lying) -> torch.Tensor:
        tensor = mapped(self)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(lazy.Lying, "mapped", watched)
    model = UNet2DConditionModel.from_pretrained(tmp_path / "plain", torch_dtype=dtype)
    assert max(most) <= 2 if dtype != torch.float32 else max(most) >= len(list(unet.parameters()))
    for (name, ours), theirs in zip(model.named_parameters(), unet.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype)), name


_LOAD = """
import sys
from pathlib import Path
import torch, transformers
from transformers import T5EncoderModel, T5Config
from floyd.store.components import load_component

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
folder, dtype, quantization = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] or None
load = lambda folder: load_component(folder, "text_encoder", "transformers", "T5EncoderModel",
                                     torch_dtype=dtype, quantization=quantization)
load(folder + "/small")  # whatever is imported and kept on the way
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = load(folder + "/large")
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is told by Linux alone")
@pytest.mark.parametrize("name", ["int8", None])
def test_what_is_loaded_is_in_memory_once_however_it_is_kept(tmp_path: Path, name: str | None) -> None:
    """Half-precision files of 200 MB, quantized or cast: what loading takes at its peak, pages of files included."""
    from transformers import T5Config, T5EncoderModel

    for size, layers in (("small", 1), ("large", 10)):
        config = T5Config(
            vocab_size=1000, d_model=1024, d_kv=64, num_heads=16, d_ff=2048, num_layers=layers,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        with torch.device("meta"):
            model = T5EncoderModel(config)
        state = {
            key: torch.full(tensor.shape, 0.01, dtype=torch.float16)
            for key, tensor in model.state_dict().items()
            if key != "encoder.embed_tokens.weight"
        }
        folder = tmp_path / size / "text_encoder"
        config.save_pretrained(folder)
        weights.write(state, folder, base="model", max_shard_size="50MB")
    full = sum(tensor.nbytes for tensor in state.values())
    assert full > 200e6
    command = [sys.executable, "-c", _LOAD, str(tmp_path), "bfloat16", name or ""]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    few = nbytes(load_component(tmp_path / "large", *T5, torch_dtype=torch.bfloat16, quantization=name))
    assert few / 2 < peak < few + 30e6, "one tensor on top, and what the work on it needs"
    assert peak < 0.7 * full if name else peak < 1.1 * full
