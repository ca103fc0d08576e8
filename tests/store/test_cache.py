from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.hub_stub import COMMIT, fill_cache
from tests.store.test_download import FP16, PLAIN, REPOSITORY, SMALL

from floyd.store.cache import cache_root, cached_pipelines, has_token, used_bytes


def content(*names: str) -> dict[str, bytes]:
    return {name: REPOSITORY[name] for name in names}


def test_a_whole_variant_is_told_from_one_that_is_not(tmp_path: Path) -> None:
    fill_cache(tmp_path, "org/half", content(*SMALL, *FP16))
    fill_cache(tmp_path, "org/both", content(*SMALL, *FP16, *PLAIN))
    both, half = cached_pipelines(tmp_path)
    assert (both.id, both.whole, both.class_name, both.commit) == ("org/both", ["plain", "fp16"], "IFPipeline", COMMIT)
    assert (half.id, half.whole, half.lacking) == ("org/half", ["fp16"], {"fp16": ()})
    assert half.num_bytes == sum(map(len, content(*SMALL, *FP16).values()))
    assert used_bytes(tmp_path) == half.num_bytes + both.num_bytes


@pytest.mark.parametrize("gone", [FP16[0], FP16[3], "unet/config.json", "tokenizer/spiece.model"])
def test_what_is_missing_is_named(tmp_path: Path, gone: str) -> None:
    fill_cache(tmp_path, "org/name", content(*(name for name in (*SMALL, *FP16) if name != gone)))
    [found] = cached_pipelines(tmp_path)
    assert found.lacking == {"fp16": (gone.partition("/")[0],)}
    assert found.whole == []


def test_a_link_to_nothing_is_missing(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path, "org/name", content(*SMALL, *FP16))
    (snapshot / FP16[3]).resolve().unlink()
    assert cached_pipelines(tmp_path)[0].lacking == {"fp16": ("unet",)}


def test_what_is_no_pipeline_is_left_out(tmp_path: Path) -> None:
    fill_cache(tmp_path, "org/single", {"config.json": b"{}", "model.safetensors": b"x"})
    fill_cache(tmp_path, "org/broken", {"model_index.json": b"{"})
    fill_cache(tmp_path, "org/empty", {"model_index.json": json.dumps({"_class_name": "IFPipeline"}).encode()})
    (tmp_path / "models--org--begun" / "blobs").mkdir(parents=True)
    (tmp_path / "datasets--org--data").mkdir()
    assert [found.id for found in cached_pipelines(tmp_path)] == ["org/empty"]
    assert cached_pipelines(tmp_path / "absent") == []
    assert used_bytes(tmp_path / "absent") == 0


def test_unfinished_downloads_are_counted_apart(tmp_path: Path) -> None:
    fill_cache(tmp_path, "org/name", content(*SMALL, *FP16))
    (tmp_path / "models--org--name" / "blobs" / "abc.incomplete").write_bytes(bytes(300))
    [found] = cached_pipelines(tmp_path)
    assert found.unfinished_bytes == 300
    assert found.num_bytes == used_bytes(tmp_path)


def test_without_a_branch_the_latest_commit_counts(tmp_path: Path) -> None:
    fill_cache(tmp_path, "org/name", content(*SMALL, *FP16))
    (tmp_path / "models--org--name" / "refs" / "main").write_text("f" * 40)
    assert cached_pipelines(tmp_path)[0].commit == COMMIT


def test_a_token_is_there_or_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert has_token() is False
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    assert has_token() is True


def test_the_cache_is_where_the_hubs_client_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
