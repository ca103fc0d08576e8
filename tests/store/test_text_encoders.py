"""T5 from the files that people have says what the original says; left on disk, the same to the bit."""

from __future__ import annotations

import gc
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests import tiny
from torch import Tensor

from floyd import DiffusionPipeline, load_text_encoder, load_tokenizer
from floyd.errors import CheckpointError
from floyd.runtime.quantize import quantization_of, quantize
from floyd.store import weights
from floyd.store.components import save_component
from floyd.store.layered import LayeredT5Encoder
from floyd.text.identity import identity
from floyd.text.prompts import embed

IDS = torch.tensor([[5, 9, 2, 2, 1, 0, 0], [7, 1, 0, 0, 0, 0, 0]])
MASK = (IDS != 0).long()


def t5(seed: int = 4, **changes: Any) -> Any:
    """With a width that GGUF can cut into blocks of 32."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    keys: dict[str, Any] = {
        "vocab_size": 128, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2,
        "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0,
    }  # fmt: skip
    return tiny.disturbed(T5EncoderModel(T5Config(**{**keys, **changes})), seed).requires_grad_(False)


def states(encoder: Any) -> Tensor:
    with torch.no_grad():
        return encoder(IDS, attention_mask=MASK)[0]


def stored(model: Any) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if "embed_tokens" not in key}


def likeness(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.float(), b.float(), dim=-1).mean())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(stored(t5()), tmp_path / "t5.safetensors")
    return tmp_path / "t5.safetensors"


def written(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path)
    return path


def test_a_single_file_tells_its_own_architecture(file: Path) -> None:
    loaded = load_text_encoder(file)
    assert torch.equal(states(loaded), states(t5()))
    assert not loaded.training
    told = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")
    assert all(getattr(loaded.config, key) == getattr(t5().config, key) for key in told)


def test_a_first_t5_without_gates_is_told_too(tmp_path: Path) -> None:
    model = t5(feed_forward_proj="relu")
    assert torch.equal(states(load_text_encoder(written(tmp_path / "t.safetensors", stored(model)))), states(model))


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_is_cast_and_quantized_as_it_is_read(file: Path, name: str, dtype: torch.dtype) -> None:
    loaded = load_text_encoder(file, dtype=dtype, quantization=name)
    assert (loaded.dtype, quantization_of(loaded)) == (dtype, name)
    assert likeness(states(loaded), states(quantize(t5(), name))) > 0.999


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight", "both"])
@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
def test_googles_files_and_whole_checkpoints_have_the_encoder_in_them(
    tmp_path: Path, embedding: str, prefix: str
) -> None:
    state = stored(t5())
    table = state.pop("shared.weight")
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if embedding in (name, "both"):
            state[name] = table.clone()
    state |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2)}
    state = {prefix + key: tensor for key, tensor in state.items()}
    if prefix:
        state["model.diffusion_model.out.weight"] = torch.ones(3)
    path = written(tmp_path / "all.safetensors", state)
    assert torch.equal(states(load_text_encoder(path)), states(t5()))


def test_a_folder_in_googles_layout_and_a_pipelines_folder(tmp_path: Path) -> None:
    model = t5()
    google = tmp_path / "google"
    model.config.save_pretrained(google)
    whole = {**stored(model), "lm_head.weight": torch.ones(2), "decoder.final_layer_norm.weight": torch.ones(2)}
    weights.write(whole, google, base="model", safe_serialization=False)
    assert torch.equal(states(load_text_encoder(google)), states(model))

    pipe = DiffusionPipeline.from_pretrained(tiny.save(tiny.stage_one(), tmp_path / "pipe"))
    for loaded in (
        load_text_encoder(tmp_path / "pipe"),
        load_text_encoder(tmp_path / "pipe", subfolder="text_encoder"),
        load_text_encoder(tmp_path / "pipe" / "text_encoder"),
    ):
        assert torch.equal(states(loaded), states(pipe.text_encoder))


@pytest.mark.usefixtures("published")
def test_a_repository_in_the_hubs_cache() -> None:
    loaded = load_text_encoder("DeepFloyd/IF-I-M-v1.0", subfolder="text_encoder", variant="fp16", dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert load_tokenizer("DeepFloyd/IF-I-M-v1.0", subfolder="tokenizer")("a photo").input_ids[-1] == 1


@pytest.mark.parametrize("scale", [None, "scale_weight", "weight_scale"])
@pytest.mark.parametrize("resident", ["all", "layer"])
def test_float8_files_are_read_with_their_scales(tmp_path: Path, scale: str | None, resident: Any) -> None:
    state = stored(t5())
    few: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if tensor.ndim == 2 and "relative" not in key:
            factor = torch.tensor(1.0) if scale is None else tensor.abs().amax() / 448
            few[key] = (tensor / factor).to(torch.float8_e4m3fn)
            if scale is not None:
                few[key.replace("weight", scale)] = factor
                few[key.replace("weight", "scale_input")] = factor.clone()
        else:
            few[key] = tensor.half()
    if scale is not None:
        few["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    path = written(tmp_path / "t5xxl_fp8.safetensors", few)
    assert likeness(states(load_text_encoder(path, resident=resident)), states(t5())) > 0.99


def test_blockwise_scales_are_refused(tmp_path: Path) -> None:
    state = stored(t5())
    key = "encoder.block.1.layer.0.SelfAttention.q.weight"
    state[key] = state[key].to(torch.float8_e4m3fn)
    state[key.replace("weight", "weight_scale")] = torch.ones(16, 2)
    with pytest.raises(CheckpointError, match=r"scales of shape \(16, 2\), which floyd does not read"):
        load_text_encoder(written(tmp_path / "t.safetensors", state))


# ---------------------------------------------------------------------------------------------------------------- GGUF

_TO_GGUF = {
    "layer.0.SelfAttention.q": "attn_q", "layer.0.SelfAttention.k": "attn_k", "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o", "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm", "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up", "layer.1.DenseReluDense.wo": "ffn_down",
}  # fmt: skip


def gguf_file(path: Path, state: dict[str, Tensor], kind: str) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "t5encoder")
    quant = gguf.GGMLQuantizationType[kind]
    for key, tensor in state.items():
        name = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}.get(
            key
        )
        if name is None:
            _, _, number, rest = key.split(".", 3)
            name = f"enc.blk.{number}.{_TO_GGUF[rest.removesuffix('.weight')]}.weight"
        values = tensor.float().numpy()
        if tensor.ndim == 2 and "relative" not in key:
            writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "least"), [("F32", 1), ("F16", 0.99999), ("BF16", 0.9999), ("Q8_0", 0.999), ("Q4_0", 0.9)]
)
@pytest.mark.parametrize("resident", ["all", "layer"])
def test_gguf_files_are_read(tmp_path: Path, kind: str, least: float, resident: Any) -> None:
    loaded = load_text_encoder(gguf_file(tmp_path / "t5.gguf", stored(t5()), kind), resident=resident)
    assert likeness(states(loaded), states(t5())) >= least - 1e-6
    if kind == "F32":
        assert torch.equal(states(loaded), states(t5()))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_the_k_kinds_are_unpacked_as_their_authors_do(tmp_path: Path, kind: str) -> None:
    """Their packer is not part of the package: any bytes are a weight."""
    gguf = pytest.importorskip("gguf")
    from floyd.store.gguf import GGUFState

    quant = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    content = np.random.default_rng(0).integers(0, 50, (4, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "t5encoder")
    writer.add_tensor("token_embd.weight", content, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    state = GGUFState(tmp_path / "t.gguf")
    assert state.shapes["token_embd.weight"] == tuple(state["token_embd.weight"].shape) == (4, 512)
    assert np.array_equal(state["token_embd.weight"].numpy(), gguf.quants.dequantize(content, quant), equal_nan=True)


def test_a_gguf_file_can_be_quantized_anew_and_broken_ones_are_told(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "t5.gguf", stored(t5()), "Q8_0")
    loaded = load_text_encoder(path, quantization="int8", dtype=torch.bfloat16)
    assert quantization_of(loaded) == "int8"
    assert likeness(states(loaded), states(t5())) > 0.998
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        load_text_encoder(tmp_path / "broken.gguf")


# ------------------------------------------------------------------------------------------------------- layer by layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_left_on_disk_it_says_the_same_to_the_bit(file: Path, dtype: torch.dtype) -> None:
    whole, layered = (load_text_encoder(file, dtype=dtype, resident=how) for how in ("all", "layer"))
    for _ in range(2):
        assert torch.equal(states(layered), states(whole))
    assert layered.dtype == dtype
    assert not isinstance(layered, torch.nn.Module), "nobody moves or casts it"


def test_what_was_saved_quantized_can_stay_on_disk(tmp_path: Path) -> None:
    for name in ("int8", "int4", "fp8"):
        few = quantize(t5(), name)
        save_component(few, tmp_path / name, "text_encoder", max_shard_size="20KB")
        layered = load_text_encoder(tmp_path / name / "text_encoder", resident="layer")
        assert torch.equal(states(layered), states(few))


def test_only_one_block_is_in_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layered = load_text_encoder(file, resident="layer")
    blocks = layered._model.encoder.block
    seen: list[list[bool]] = []
    forward = type(blocks[0]).forward

    def watched(block: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([any(not p.is_meta for p in each.parameters()) for each in blocks])
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(type(blocks[0]), "forward", watched)
    states(layered)
    assert seen == [[i == j for j in range(3)] for i in range(3)]
    gc.collect()
    assert all(p.is_meta for p in blocks.parameters())
    assert layered._model.shared.weight.is_meta


def test_calls_at_the_same_time_and_after_a_failure(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layered = load_text_encoder(file, resident="layer")
    expected = states(layered)
    with pytest.raises(IndexError, match="has 128 rows"):
        layered(torch.tensor([[500]]))
    with monkeypatch.context() as patch:
        patch.setattr(layered._model.encoder.block[1], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            states(layered)
    assert all(p.is_meta for p in layered._model.encoder.block.parameters())
    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: states(layered), range(6)))


def test_it_is_known_by_its_files(file: Path, tmp_path: Path) -> None:
    first = identity(load_text_encoder(file, resident="layer"))
    assert identity(load_text_encoder(file, resident="layer")) == first
    assert identity(load_text_encoder(file, resident="layer", dtype="bfloat16")) != first
    shutil.copy(file, tmp_path / "kept.safetensors")
    state = stored(t5())
    state["shared.weight"] += 1
    save_file(state, file)
    assert identity(load_text_encoder(file, resident="layer")) != first


# ------------------------------------------------------------------------------------------------------------ pipelines


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return tiny.save(tiny.stage_one(), tmp_path / "pipeline")


def test_a_pipeline_takes_a_path(pipeline: Path, file: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(pipeline, text_encoder=file, torch_dtype={"text_encoder": "bfloat16"})
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert quantization_of(
        DiffusionPipeline.from_pretrained(pipeline, text_encoder=file, quantization="int8").text_encoder
    )
    other = DiffusionPipeline.from_pretrained(pipeline, text_encoder=str(file), tokenizer=pipeline / "tokenizer")
    assert torch.equal(states(other.text_encoder), states(t5()))
    assert other.tokenizer("a cat").input_ids == pipe.tokenizer("a cat").input_ids


def test_a_pipeline_works_with_an_encoder_on_disk(pipeline: Path, file: Path) -> None:
    layered = load_text_encoder(file, resident="layer")
    pipe = DiffusionPipeline.from_pretrained(pipeline, text_encoder=layered, device_map="cpu", text_cache="memory")
    pipe.to(torch.float32).enable_model_cpu_offload(device="cpu")
    assert isinstance(pipe.text_encoder, LayeredT5Encoder)
    states = pipe.encode_prompt("a red cat", do_classifier_free_guidance=False)[0]
    assert torch.equal(states, embed(["a red cat"], pipe.tokenizer, t5()))
    assert len(pipe.text_cache) == 1
    alone = DiffusionPipeline.from_pretrained(pipeline, text_encoder=layered, unet=None)
    assert torch.equal(alone.encode_prompt("a red cat")[0], states)


def test_what_is_no_t5_or_nowhere_is_refused(tmp_path: Path, file: Path) -> None:
    other = written(tmp_path / "other.safetensors", {"conv.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"not the weights of a T5 encoder: no shared\.weight"):
        load_text_encoder(other)
    torn = {"shared.weight": torch.ones(4, 4), "encoder.block.0.layer.0.layer_norm.weight": torch.ones(4)}
    with pytest.raises(CheckpointError, match=r"not the weights of a T5 encoder: encoder\.block\.0.* is missing"):
        load_text_encoder(written(other, torn))
    for resident in ("all", "layer"):
        state = stored(t5())
        del state["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
        with pytest.raises(CheckpointError, match=r"missing: .*block\.1\.layer\.1\.DenseReluDense\.wo"):
            load_text_encoder(written(other, state), resident=resident)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="does not exist"):
        load_text_encoder(tmp_path / "nowhere.gguf")
    with pytest.raises(ValueError, match="resident must be"):
        load_text_encoder(file, resident="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="save the encoder quantized"):
        load_text_encoder(file, resident="layer", quantization="int8")
    upscaler = tiny.save(tiny.upscaler(), tmp_path / "upscaler")
    with pytest.raises(ValueError, match="only of a T5 a path will do"):
        DiffusionPipeline.from_pretrained(upscaler, text_encoder=file)


def test_tokenizers_are_found_where_they_lie(published: Path, pipeline: Path) -> None:
    spiece = next(published.rglob("tokenizer/spiece.model"))
    for place in (spiece, spiece.parent, spiece.parent.parent):
        assert load_tokenizer(place)("a photo").input_ids[-1] == 1
    assert load_tokenizer(pipeline)("a cat").input_ids
