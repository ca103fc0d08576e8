from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.store.conftest import COMMIT, Hub, fill_cache

from floyd.errors import CheckpointError, DownloadError
from floyd.store import hub as store_hub
from floyd.store.hub import snapshot

ID = "org/name"
INDEX: dict[str, Any] = {
    "_class_name": "IFPipeline",
    "_ignore_files": ["pytorch_model.bin"],
    "requires_safety_checker": True,
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "watermarker": [None, None],
}
NAMES = [
    "README.md", "config.yml", "pytorch_model.bin",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/model.fp16-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.fp16.json",
    "text_encoder/model.8bit.safetensors",
    "text_encoder/pytorch_model.bin.index.json",
    "text_encoder/pytorch_model-00001-of-00002.bin", "text_encoder/pytorch_model-00002-of-00002.bin",
    "tokenizer/spiece.model", "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
    "watermarker/config.json",
]  # fmt: skip
REPOSITORY = {"model_index.json": json.dumps(INDEX).encode(), **{name: name.encode() for name in NAMES}}


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def unpacked(folder: Path, files: dict[str, bytes] = REPOSITORY) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# --- local folders


def test_a_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert snapshot(unpacked(tmp_path)) == tmp_path
    assert snapshot(str(tmp_path), components=["unet"]) == tmp_path


@pytest.mark.parametrize("nothing", ["./absent", "/absent/folder", "org/name/more", "name", "org/na me", ""])
def test_what_is_neither_folder_nor_id_is_refused(
    nothing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if nothing == "":
        nothing = "org/"
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        snapshot(nothing)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ValueError, match="is a file; give the folder"):
        snapshot(tmp_path / "x.safetensors")


def test_a_folder_without_an_index_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json does not exist"):
        snapshot(tmp_path)


def test_an_unknown_component_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no component vae; it has scheduler, text_encoder"):
        snapshot(unpacked(tmp_path), components=["unet", "vae"])


def test_a_variant_that_nothing_has_is_an_error_that_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights of the variant 'bf16', only 8bit, fp16"):
        snapshot(unpacked(tmp_path), variant="bf16")


def test_a_mixture_of_variants_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        snapshot(unpacked(tmp_path), variant="fp16")
    assert "unet will be read from plain files" in caplog.text
    assert "text_encoder" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        snapshot(tmp_path, variant="fp16", components=["text_encoder"])
    assert not caplog.records


# --- the cache


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_the_cache_is_used(how: str, tmp_path: Path) -> None:
    cached = fill_cache(tmp_path, ID, REPOSITORY)
    options = {"local_files_only": True} if how == "argument" else {}  # conftest sets HF_HUB_OFFLINE
    assert snapshot(ID, cache_dir=tmp_path, **options) == cached


def test_offline_a_revision_may_be_a_commit(tmp_path: Path) -> None:
    cached = fill_cache(tmp_path, ID, REPOSITORY)
    assert snapshot(ID, cache_dir=tmp_path, revision=COMMIT) == cached
    with pytest.raises(DownloadError, match="not in the cache"):
        snapshot(ID, cache_dir=tmp_path, revision="other")


def test_offline_an_empty_cache_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"org/name is not in the cache .*offline.*or give a local folder"):
        snapshot(ID, cache_dir=tmp_path)


def test_offline_a_cache_that_holds_another_component_is_not_enough(tmp_path: Path) -> None:
    part = {name: content for name, content in REPOSITORY.items() if not name.startswith("unet/diffusion")}
    cached = fill_cache(tmp_path, ID, part)
    assert snapshot(ID, cache_dir=tmp_path, components=["text_encoder", "tokenizer"]) == cached
    with pytest.raises(DownloadError, match="unet has no complete weights there, and floyd is offline"):
        snapshot(ID, cache_dir=tmp_path)


def test_offline_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    part = dict(REPOSITORY)
    for name in ("model-00002-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"):
        del part[f"text_encoder/{name}"]
    fill_cache(tmp_path, ID, part)
    with pytest.raises(DownloadError, match="text_encoder has no complete weights"):
        snapshot(ID, cache_dir=tmp_path)


def test_offline_a_cache_without_an_index_is_no_pipeline(tmp_path: Path) -> None:
    fill_cache(tmp_path, ID, {"unet/config.json": b"{}"})
    with pytest.raises(DownloadError, match=r"no model_index\.json.*offline"):
        snapshot(ID, cache_dir=tmp_path)


# --- a hub that works


def test_only_what_is_read_is_fetched(hub: Hub) -> None:
    hub.repositories[ID] = REPOSITORY
    folder = snapshot(ID)
    assert files_of(folder) == {
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json", "tokenizer/spiece.model", "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert (folder / "unet/config.json").read_text() == "unet/config.json"


def test_components_variant_and_format_choose_the_files(hub: Hub) -> None:
    hub.repositories[ID] = REPOSITORY
    folder = snapshot(ID, components=["text_encoder"], variant="fp16")
    assert files_of(folder) == {
        "model_index.json", "text_encoder/config.json", "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/model.fp16-00002-of-00002.safetensors",
    }  # fmt: skip
    hub.fetched.clear()
    snapshot(ID, components=["unet"], use_safetensors=False)
    assert set(hub.fetched) == {"unet/config.json", "unet/diffusion_pytorch_model.bin"}


def test_what_was_fetched_once_is_found_offline(hub: Hub) -> None:
    hub.repositories[ID] = REPOSITORY
    folder = snapshot(ID, components=["unet"])
    hub.failure = (500, "")
    assert snapshot(ID, components=["unet"], local_files_only=True) == folder
    with pytest.raises(DownloadError, match="offline"):
        snapshot(ID, local_files_only=True)


def test_force_download_fetches_again(hub: Hub) -> None:
    hub.repositories[ID] = REPOSITORY
    snapshot(ID, components=["scheduler"])
    hub.fetched.clear()
    snapshot(ID, components=["scheduler"])
    assert hub.fetched == []
    snapshot(ID, components=["scheduler"], force_download=True)
    assert "scheduler/scheduler_config.json" in hub.fetched


def test_the_token_travels_to_the_hub_and_nowhere_else(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.repositories[ID] = REPOSITORY
    snapshot(ID, components=["scheduler"], token="hf_secret")
    assert "Bearer hf_secret" in hub.tokens
    hub.failure = (403, "GatedRepo")
    with caplog.at_level(logging.DEBUG), pytest.raises(DownloadError) as caught:
        snapshot("org/other", token="hf_secret")
    assert "hf_secret" not in str(caught.value) + caplog.text + repr(store_hub.Source(ID, token="hf_secret"))


def test_a_single_component_is_fetched_from_its_folder_or_the_root(hub: Hub) -> None:
    hub.repositories[ID] = REPOSITORY
    hub.repositories["org/single"] = {"config.json": b"{}", "model.safetensors": b"x", "other.safetensors": b"y"}
    unet = store_hub.component(store_hub.Source(ID), "unet")
    assert files_of(unet) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert files_of(store_hub.component(store_hub.Source("org/single"), None)) == {"config.json", "model.safetensors"}
    with pytest.raises(CheckpointError, match="no files for vae"):
        store_hub.component(store_hub.Source(ID), "vae")
    with pytest.raises(ValueError, match="no weights of the variant 'fp16', only plain files"):
        store_hub.component(store_hub.Source(ID), "unet", variant="fp16")


def test_the_files_of_a_folder_or_a_repository_are_listed(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[ID] = {"a.bin": b"", "sub/b.bin": b"", "sub/deeper/c.bin": b""}
    (tmp_path / "sub").mkdir()
    for name in ("a.bin", "sub/b.bin"):
        (tmp_path / name).touch()
    for source in (store_hub.Source(ID), store_hub.Source(tmp_path)):
        assert store_hub.names_in(source) == ["a.bin"]
        assert store_hub.names_in(source, "sub") == ["b.bin"]
        assert store_hub.names_in(source, "none") == []
    assert hub.fetched == []


def test_a_single_file_comes_from_a_folder_or_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[ID] = {"pytorch_lora_weights.safetensors": b"lora", "other.safetensors": b"no"}
    path = store_hub.file(store_hub.Source(ID), "pytorch_lora_weights.safetensors")
    assert path.read_bytes() == b"lora"
    assert hub.fetched == ["pytorch_lora_weights.safetensors"]
    assert store_hub.file(store_hub.Source(path.parent), path.name) == path
    for source in (store_hub.Source(ID), store_hub.Source(tmp_path)):
        with pytest.raises(CheckpointError, match=r"absent\.bin"):
            store_hub.file(source, "absent.bin")


# --- a hub that fails


@pytest.mark.parametrize("only_files_fail", [False, True])
def test_a_gated_repository_asks_for_the_licence(hub: Hub, only_files_fail: bool) -> None:
    hub.repositories[ID] = REPOSITORY
    hub.failure, hub.only_files_fail = (403, "GatedRepo"), only_files_fail
    with pytest.raises(DownloadError, match=r"org/name is gated.*/org/name and accept the licence.*hf auth login"):
        snapshot(ID)


def test_an_unknown_repository_is_named(hub: Hub) -> None:
    with pytest.raises(DownloadError, match="org/name was not found, or is private"):
        snapshot(ID)


def test_an_unknown_revision_is_named(hub: Hub) -> None:
    hub.repositories[ID] = REPOSITORY
    with pytest.raises(DownloadError, match="has no revision 'v9'"):
        snapshot(ID, revision="v9")


@pytest.mark.parametrize(
    ("status", "advice"), [(403, "not open to you .HTTP 403.: pass a valid token"), (500, "try again")]
)
def test_a_refusal_and_a_broken_hub_are_told_apart(hub: Hub, status: int, advice: str) -> None:
    hub.repositories[ID] = REPOSITORY
    hub.failure = (status, "")
    with pytest.raises(DownloadError, match=advice):
        snapshot(ID)


def test_an_unreachable_hub_is_told_apart(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DownloadError, match=r"could not be fetched .*check the network, or give a local folder"):
        snapshot(ID)


def test_when_the_hub_refuses_the_cache_still_serves(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.repositories[ID] = REPOSITORY
    folder = snapshot(ID, components=["unet"])
    hub.failure = (403, "GatedRepo")
    with caplog.at_level(logging.WARNING):
        assert snapshot(ID, components=["unet"]) == folder
    assert "using the cache" in caplog.text


def test_a_repository_without_an_index_is_no_pipeline(hub: Hub) -> None:
    hub.repositories[ID] = {"config.json": b"{}", "model.safetensors": b"x"}
    with pytest.raises(CheckpointError, match=r"no model_index\.json there, so no pipeline"):
        snapshot(ID)


def test_a_component_whose_weights_are_not_in_the_repository_is_named(hub: Hub) -> None:
    hub.repositories[ID] = {name: b for name, b in REPOSITORY.items() if not name.startswith("unet/diffusion")}
    with pytest.raises(CheckpointError, match="unet has no complete weights"):
        snapshot(ID)
