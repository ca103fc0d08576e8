from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.store.conftest import WORDS, files_in, fill_cache, same, t5_tokenizer_files

from floyd.errors import CheckpointError
from floyd.store import layout, weights
from floyd.store.components import load_component, save_component
from floyd.store.hub import snapshot

T5 = ("text_encoder", "transformers", "T5EncoderModel")
TOKENIZER = ("tokenizer", "transformers", "T5Tokenizer")
IDS = torch.arange(12)[None]


@pytest.fixture
def t5(tmp_path: Path) -> Any:
    """A small T5 whose checkpoint, one file, lies in text_encoder/."""
    model = tiny.t5()
    save_component(model, tmp_path, "text_encoder")
    return model


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


# ---------------------------------------------------------------------------------------------------- text encoders


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["10GB", "10KB"])
@pytest.mark.parametrize("is_safe", [True, False])
def test_t5_goes_to_disk_and_back(tmp_path: Path, variant: str | None, size: str, is_safe: bool) -> None:
    model = tiny.t5()
    save_component(model, tmp_path, "text_encoder", safe_serialization=is_safe, variant=variant, max_shard_size=size)
    again = load_component(tmp_path, *T5, variant=variant)
    assert same(again, model)
    assert torch.equal(outputs(again), outputs(model))
    assert not again.training


@pytest.mark.parametrize("index", ["model.safetensors.fp16.index.json", "model.safetensors.index.fp16.json"])
def test_t5_is_read_in_the_older_order_of_names(tmp_path: Path, t5: Any, index: str) -> None:
    folder = tmp_path / "text_encoder"
    state = weights.read(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, keys in enumerate([sorted(state)[::2], sorted(state)[1::2]], start=1):
        name = f"model-0000{number}-of-00002.fp16.safetensors"
        weights.write_file({key: state[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(outputs(load_component(tmp_path, *T5, variant="fp16")), outputs(t5))


def test_t5_keeps_its_wo_in_float32(tmp_path: Path, t5: Any) -> None:
    half = load_component(tmp_path, *T5, torch_dtype="float16")
    dtypes = {name.split(".")[-2]: parameter.dtype for name, parameter in half.named_parameters()}
    assert dtypes.pop("wo") == torch.float32
    assert set(dtypes.values()) == {torch.float16}


def test_the_precision_in_the_configuration_is_not_followed(tmp_path: Path, t5: Any) -> None:
    save_component(t5.to(torch.bfloat16), tmp_path, "text_encoder", variant="bf16")
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["dtype"] == "bfloat16"
    assert load_component(tmp_path, *T5, variant="bf16").dtype == torch.float32


def test_a_missing_variant_falls_back_to_the_plain_files(tmp_path: Path, t5: Any) -> None:
    assert same(load_component(tmp_path, *T5, variant="fp16"), t5)


def test_missing_weights_are_an_error_and_not_drawn_at_random(tmp_path: Path, t5: Any) -> None:
    folder = tmp_path / "text_encoder"
    state = weights.read(folder)
    weights.write({k: w for k, w in state.items() if "wi_0" not in k}, folder, base="model")
    with pytest.raises(CheckpointError, match=r"does not fit T5EncoderModel; missing: encoder\.block\.0"):
        load_component(tmp_path, *T5)
    weights.write({**state, "stranger": torch.ones(1)}, folder, base="model")
    with pytest.raises(CheckpointError, match="unexpected: stranger"):
        load_component(tmp_path, *T5)
    weights.write({**state, "shared.weight": torch.ones(3, 32)}, folder, base="model")
    with pytest.raises(CheckpointError, match="another shape than its config"):
        load_component(tmp_path, *T5)


def test_an_8_bit_file_is_refused_by_name(tmp_path: Path, t5: Any) -> None:
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    state = {**weights.read(tmp_path / "text_encoder"), key: torch.ones(32, 32, dtype=torch.int8)}
    weights.write(state, tmp_path / "text_encoder", base="model", variant="8bit")
    with pytest.raises(CheckpointError, match=rf"is quantized \({key}\): load the plain or fp16 weights"):
        load_component(tmp_path, *T5, variant="8bit")


def test_clips_text_encoder_is_read_under_its_older_keys(tmp_path: Path) -> None:
    kind = ("text_encoder", "transformers", "CLIPTextModel")
    model = tiny.clip_text()
    save_component(model, tmp_path, "text_encoder")
    assert same(load_component(tmp_path, *kind), model)
    state = {f"text_model.{k.removeprefix('text_model.')}": w for k, w in model.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights.write(state, tmp_path / "text_encoder", base="model")
    again = load_component(tmp_path, *kind)
    assert same(again, model)
    assert torch.equal(outputs(again), outputs(model))


def test_a_broken_configuration_is_named(tmp_path: Path, t5: Any) -> None:
    (tmp_path / "text_encoder/config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"text_encoder/config\.json cannot be read as JSON"):
        load_component(tmp_path, *T5)
    with pytest.raises(CheckpointError, match="text_encoder has no readable config"):
        load_component(tmp_path, "text_encoder", "transformers", "CLIPTextModel")
    with pytest.raises(CheckpointError, match="no folder 'text_encoder_2' for the T5EncoderModel"):
        load_component(tmp_path, "text_encoder_2", *T5[1:])


# ------------------------------------------------------------------------------------------------------- tokenizers

_TEXTS = [
    "a photo of a kangaroo", "", "   ", "hello  world", "Über café ½ ﬁ", "猫 photo", "line\nbreak\ttab", "  around  ",
    "sunglasses,hoodie!", "…", "e\u0301", "▁ a", "ＡＢＣ", "a\u00a0b", "\u200b", "🦘", "a\u3000b", "(1, 2) 50% #1",
    " ".join(WORDS),
]  # fmt: skip


@pytest.fixture
def t5_folder(tmp_path: Path, spiece: bytes) -> Path:
    t5_tokenizer_files(tmp_path / "tokenizer", spiece)
    return tmp_path


@pytest.mark.parametrize("class_name", ["T5Tokenizer", "T5TokenizerFast"])
def test_t5s_tokenizer_equals_sentencepiece(t5_folder: Path, spiece: bytes, class_name: str) -> None:
    import sentencepiece

    tokenizer = load_component(t5_folder, "tokenizer", "transformers", class_name)
    reference = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    for text in _TEXTS:
        assert tokenizer(text)["input_ids"] == [*reference.encode(text), 1], text


def test_t5s_tokenizer_pads_truncates_and_knows_its_special_ids(t5_folder: Path, spiece: bytes) -> None:
    import sentencepiece

    tokenizer = load_component(t5_folder, *TOKENIZER)
    num_pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece).get_piece_size()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == num_pieces + 100
    assert tokenizer.convert_tokens_to_ids(["<extra_id_99>", "<extra_id_0>"]) == [num_pieces, num_pieces + 99]
    batch = tokenizer(
        ["a photo", " ".join(WORDS * 4)], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    assert batch.input_ids.shape == (2, 77)
    length = int(batch.attention_mask[0].sum())
    assert batch.input_ids[0, length - 1] == 1
    assert batch.input_ids[0, length:].eq(0).all()
    assert batch.input_ids[1, -1] == 1
    assert batch.attention_mask[1].all()


def test_a_tokenizer_goes_to_disk_and_back(t5_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_component(t5_folder, *TOKENIZER)
    save_component(tokenizer, tmp_path / "again", "tokenizer")
    again = load_component(tmp_path / "again", *TOKENIZER)
    assert [again(text)["input_ids"] for text in _TEXTS] == [tokenizer(text)["input_ids"] for text in _TEXTS]
    clip = tiny.clip_tokenizer()
    save_component(clip, tmp_path / "clip", "tokenizer")
    loaded = load_component(tmp_path / "clip", "tokenizer", "transformers", "CLIPTokenizer")
    assert loaded("a red cat")["input_ids"] == clip("a red cat")["input_ids"]


@pytest.mark.parametrize("absent", ["sentencepiece.sentencepiece_model_pb2", "google.protobuf.message"])
def test_a_tokenizer_whose_reader_is_not_installed_says_what_to_install(
    t5_folder: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(CheckpointError, match=f"cannot be read without: pip install sentencepiece .*{absent}"):
        load_component(t5_folder, *TOKENIZER)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [("tokenizer", "T5Tokenizer"), ("tokenizer", "CLIPTokenizer"), ("feature_extractor", "CLIPImageProcessor")],
)
def test_a_folder_without_the_vocabulary_is_named_and_none_is_made_up(
    tmp_path: Path, name: str, class_name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    with pytest.raises(CheckpointError, match=f"{name} does not hold the files of a {class_name}"):
        load_component(tmp_path, name, "transformers", class_name)


# ------------------------------------------------------------------------------------------------- whole pipelines


def _loaded(folder: Path, **options: Any) -> dict[str, Any]:
    index = layout.read_index(folder)
    return {n: load_component(folder, n, *kind, **options) for n, kind in index.components.items() if kind}


def _saved(folder: Path, parts: dict[str, Any], index: layout.ModelIndex, **options: Any) -> None:
    for name, part in parts.items():
        save_component(part, folder, name, **options)
    alive = {name: parts.get(name) for name in index.components}
    layout.write_index(folder, index.class_name, alive, values=index.values, foreign=index.foreign)


@pytest.mark.parametrize("build", [tiny.stage_one, tiny.stage_two, tiny.upscaler], ids=lambda build: build.__name__)
@pytest.mark.parametrize("options", [{}, {"variant": "fp16", "max_shard_size": "50KB"}], ids=["plain", "fp16"])
def test_a_pipeline_of_the_incumbent_is_read_and_the_incumbent_reads_ours(
    tmp_path: Path, build: Any, options: dict[str, Any]
) -> None:
    variant = options.get("variant")
    theirs = build()
    folder = tiny.save(theirs, tmp_path / "theirs", **options)
    assert snapshot(folder, variant=variant) == folder
    parts = _loaded(folder, variant=variant)
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            assert same(part, getattr(theirs, name)), name
    _saved(tmp_path / "ours", parts, layout.read_index(folder), **options)
    again = type(theirs).from_pretrained(tmp_path / "ours", variant=variant)
    assert {name: type(part) for name, part in again.components.items()} == {
        name: type(part) for name, part in theirs.components.items()
    }
    for name, part in again.components.items():
        if isinstance(part, torch.nn.Module):
            assert same(part, getattr(theirs, name)), name
        elif name.endswith("scheduler"):
            assert _plain(part.config) == _plain(getattr(theirs, name).config)


def _plain(config: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


def test_the_safety_modules_of_the_incumbent_are_read(tmp_path: Path) -> None:
    """The incumbent's checker cannot read itself under transformers 5, so only this way round."""
    modules = tiny.safety_modules()
    for name, module in modules.items():
        module.save_pretrained(tmp_path / name)
    (tmp_path / "watermarker/config.json").write_text('{"_class_name": "IFWatermark", "_diffusers_version": "0.15.0"}')
    checker = load_component(tmp_path, "safety_checker", "deepfloyd_if", "IFSafetyChecker")
    assert same(checker, modules["safety_checker"])
    assert not any(buffer.is_meta for buffer in checker.buffers())
    marker = load_component(tmp_path, "watermarker", "deepfloyd_if", "IFWatermark")
    assert torch.equal(marker.watermark_image, modules["watermarker"].watermark_image)
    extractor = load_component(tmp_path, "feature_extractor", "transformers", "CLIPFeatureExtractor")
    assert extractor.to_dict() == modules["feature_extractor"].to_dict()
    for name, part in {"safety_checker": checker, "watermarker": marker, "feature_extractor": extractor}.items():
        save_component(part, tmp_path / "ours", name)
    assert (tmp_path / "ours/safety_checker/model.safetensors").is_file()
    assert same(load_component(tmp_path / "ours", "safety_checker", "deepfloyd_if", "IFSafetyChecker"), checker)


def test_a_compiled_network_is_saved_under_its_own_keys(tmp_path: Path) -> None:
    from floyd.models.watermark import IFWatermarker

    marker = IFWatermarker()
    save_component(torch.compile(marker, backend="eager"), tmp_path, "watermarker")
    assert weights.read(tmp_path / "watermarker").keys() == {"watermark_image"}


def test_a_pipeline_is_loaded_from_the_cache_without_a_network(tmp_path: Path) -> None:
    theirs = tiny.stage_one()
    files = files_in(tiny.save(theirs, tmp_path / "repo"))
    fill_cache(tmp_path / "cache", "org/name", files)
    folder = snapshot("org/name", cache_dir=tmp_path / "cache", local_files_only=True)
    parts = _loaded(folder, torch_dtype=torch.float32)
    assert same(parts["unet"], theirs.unet)
    assert torch.equal(outputs(parts["text_encoder"]), outputs(theirs.text_encoder))
