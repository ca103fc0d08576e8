from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.hub_stub import COMMIT, LARGE, LISTING, Fault, Hub, digest

from floyd.errors import CheckpointError, DownloadError
from floyd.store import download
from floyd.store.download import Plan, check_space, fetch, plan
from floyd.store.hub import Source, snapshot
from floyd.store.transfer import Patience

ID = "org/name"
INDEX: dict[str, Any] = {
    "_class_name": "IFPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "watermarker": ["deepfloyd_if", "IFWatermarker"],
}
SMALL = ("model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer/spiece.model",
         "unet/config.json", "watermarker/config.json")  # fmt: skip
FP16 = ("text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/model.fp16-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.fp16.json", "unet/diffusion_pytorch_model.fp16.safetensors",
        "watermarker/diffusion_pytorch_model.safetensors")  # fmt: skip
PLAIN = ("text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors",
         "text_encoder/model.safetensors.index.json", "unet/diffusion_pytorch_model.safetensors",
         "watermarker/diffusion_pytorch_model.safetensors")  # fmt: skip
OTHERS = ("README.md", "pytorch_model.bin", "text_encoder/model.8bit.safetensors", "text_encoder/pytorch_model.bin",
          "text_encoder/pytorch_model.fp16.bin", "unet/diffusion_pytorch_model.bin",
          "unet/diffusion_pytorch_model.fp16.bin", "watermarker/diffusion_pytorch_model.bin")  # fmt: skip
REPOSITORY = {name: name.encode() * 50 for name in (*SMALL, *FP16, *PLAIN, *OTHERS)}
REPOSITORY["model_index.json"] = json.dumps(INDEX).encode()
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
HASTE = Patience(retries=0)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def repository(hub: Hub) -> dict[str, bytes]:
    hub.repositories[ID] = dict(REPOSITORY)
    return hub.repositories[ID]


def named(planned: Plan) -> set[str]:
    return {file.name for file in planned.files}


def size(*names: str) -> int:
    return sum(len(REPOSITORY[name]) for name in names)


# --- the plan


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (*SMALL, *PLAIN)),
        ({"variant": "fp16"}, (*SMALL, *FP16)),
        ({"variant": "fp16", "without": ["text_encoder"]}, [n for n in (*SMALL, *FP16) if "text_encoder" not in n]),
        ({"components": ["unet"]}, ("model_index.json", "unet/config.json", PLAIN[3])),
        ({"components": ["unet"], "use_safetensors": False}, ("model_index.json", "unet/config.json", OTHERS[5])),
        ({"components": []}, ("model_index.json",)),
        ({"variant": "fp16", "without": ["vae"]}, (*SMALL, *FP16)),
    ],
)
def test_only_what_will_be_read_is_planned(
    repository: dict[str, bytes], options: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    planned = plan(Source(ID), **options)
    assert named(planned) == set(wanted)
    assert planned.total == planned.missing == size(*wanted)
    assert planned.commit == COMMIT


def test_a_plan_writes_nothing(repository: dict[str, bytes], tmp_path: Path) -> None:
    plan(Source(ID))
    assert not (tmp_path / "cache").exists()


def test_a_single_model_is_planned_from_its_root(hub: Hub) -> None:
    hub.repositories[ID] = {"config.json": b"{}", "model.safetensors": b"x", "model.fp16.safetensors": b"y"}
    planned = plan(Source(ID), variant="fp16")
    assert named(planned) == {"config.json", "model.fp16.safetensors"}
    with pytest.raises(ValueError, match="is a single model and has no components"):
        plan(Source(ID), without=["unet"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": ["vae"]}, "no component vae; it has scheduler, text_encoder"),
        ({"variant": "bf16"}, "no weights of the variant 'bf16', only 8bit, fp16"),
    ],
)
def test_a_wrong_wish_is_refused(repository: dict[str, bytes], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(Source(ID), **options)


def test_a_folder_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder of this machine; there is nothing to download"):
        plan(Source(tmp_path))


def test_offline_nothing_can_be_downloaded() -> None:
    with pytest.raises(DownloadError, match="cannot be downloaded: floyd is offline"):
        plan(Source(ID))


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "cannot be read as JSON"), (b"[]", "must hold a JSON object, got a list")]
)
def test_a_broken_index_is_told(hub: Hub, content: bytes, message: str) -> None:
    hub.repositories[ID] = {"model_index.json": content}
    with pytest.raises(CheckpointError, match=message):
        plan(Source(ID))


def test_a_name_that_a_file_system_may_misread_is_not_fetched(repository: dict[str, bytes]) -> None:
    repository["unet/..\\..\\evil.json"] = repository["unet/../evil.json"] = b"{}"
    assert not any("evil" in name for name in named(plan(Source(ID))))


def test_asking_is_tried_again(repository: dict[str, bytes], hub: Hub) -> None:
    quick, notes = Patience(retries=2, first_s=0.01), list[str]()
    hub.faults[LISTING] = [Fault(500), Fault(502)]
    hub.faults["model_index.json"] = [Fault(503)]
    assert plan(Source(ID), patience=quick, on_note=notes.append).total > 0
    assert [note.split(";")[0] for note in notes] == [f"the hub answered HTTP {n}" for n in (500, 502, 503)]


# --- the fetching


def fetched(planned: Plan, **options: Any) -> Path:
    return fetch(planned, patience=options.pop("patience", HASTE), **options)


def test_what_was_downloaded_is_found_offline(repository: dict[str, bytes], hub: Hub) -> None:
    told: list[int] = []
    planned = plan(Source(ID), variant="fp16")
    folder = fetched(planned, on_bytes=told.append)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {*SMALL, *FP16}
    assert all((folder / name).read_bytes() == REPOSITORY[name] for name in (*SMALL, *FP16))
    assert sum(told) == planned.total
    assert set(hub.fetched) == {*SMALL, *FP16}
    hub.failure = (500, "")
    assert snapshot(ID, variant="fp16", local_files_only=True) == folder
    assert snapshot(ID, variant="fp16", revision=COMMIT, local_files_only=True) == folder


def test_the_hubs_own_client_takes_it_for_its_own(repository: dict[str, bytes], hub: Hub) -> None:
    from huggingface_hub import scan_cache_dir

    folder = fetched(plan(Source(ID), variant="fp16"))
    hub.fetched.clear()
    assert snapshot(ID, variant="fp16") == folder  # online: it asks, and fetches nothing
    assert hub.fetched == []
    [found] = scan_cache_dir(folder.parents[2]).repos
    assert (found.repo_id, found.nb_files) == (ID, len({REPOSITORY[name] for name in (*SMALL, *FP16)}))
    assert [sorted(revision.refs) for revision in found.revisions] == [["main"]]


def test_what_its_client_fetched_is_not_fetched_again(repository: dict[str, bytes], hub: Hub) -> None:
    folder = snapshot(ID, components=["unet"], variant="fp16")
    planned = plan(Source(ID), components=["unet"], variant="fp16")
    assert planned.missing == 0
    hub.fetched.clear()
    assert fetched(planned) == folder
    assert hub.fetched == []


def test_a_download_that_broke_off_goes_on(repository: dict[str, bytes], hub: Hub) -> None:
    half = len(REPOSITORY[UNET]) // 2
    hub.faults[UNET] = [Fault(cut_at=half)]
    with pytest.raises(DownloadError, match=rf"could not be fetched .*{half / 1000:.3g} kB of {UNET} are kept"):
        fetched(plan(Source(ID), variant="fp16"), workers=1)
    with pytest.raises(DownloadError, match="not in the cache"):
        snapshot(ID, variant="fp16", local_files_only=True)  # half a checkpoint is not offered as one
    again = plan(Source(ID), variant="fp16")
    assert again.present >= half
    told, missing = list[int](), again.missing
    hub.fetched.clear()
    fetched(again, on_bytes=told.append)
    assert hub.ranges == [f"bytes={half}-"]
    assert sum(told) == missing > 0
    assert snapshot(ID, variant="fp16", local_files_only=True)


def test_a_torn_file_in_the_cache_is_fetched_again(repository: dict[str, bytes], hub: Hub) -> None:
    folder = fetched(plan(Source(ID), variant="fp16"))
    (folder / UNET).resolve().write_bytes(b"torn")
    planned = plan(Source(ID), variant="fp16")
    assert planned.missing == len(REPOSITORY[UNET])
    fetched(planned)
    assert (folder / UNET).read_bytes() == REPOSITORY[UNET]


@pytest.mark.parametrize("hard_links", [True, False])
def test_without_symbolic_links_the_files_are_there_all_the_same(
    repository: dict[str, bytes], hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("not here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    folder = fetched(plan(Source(ID), variant="fp16"))
    assert (folder / UNET).read_bytes() == REPOSITORY[UNET]
    assert snapshot(ID, variant="fp16", local_files_only=True) == folder


def test_two_names_of_one_content_are_fetched_once(repository: dict[str, bytes], hub: Hub) -> None:
    repository["text_encoder/config.json"] = repository["unet/config.json"]
    folder = fetched(plan(Source(ID)))
    assert len([name for name in hub.fetched if name.endswith("/config.json")]) == 2  # and the watermarker's
    assert (folder / "unet/config.json").read_bytes() == (folder / "text_encoder/config.json").read_bytes()


def test_a_mirror_that_lists_names_alone_is_left_to_the_hubs_client(repository: dict[str, bytes], hub: Hub) -> None:
    hub.lists_sizes = False
    planned = plan(Source(ID), variant="fp16")
    assert not planned.is_measured
    folder = fetched(planned)
    assert snapshot(ID, variant="fp16", local_files_only=True) == folder


def test_a_revision_is_remembered_by_its_name(repository: dict[str, bytes], hub: Hub, tmp_path: Path) -> None:
    fetched(plan(Source(ID, revision="main"), components=["unet"]))
    fetched(plan(Source(ID, revision=COMMIT), components=["unet"]))
    assert [path.name for path in (tmp_path / "cache" / "models--org--name" / "refs").iterdir()] == ["main"]


def test_the_token_is_sent_and_not_told(repository: dict[str, bytes], hub: Hub) -> None:
    fetched(plan(Source(ID, token="hf_secret"), components=["unet"]))
    assert set(hub.tokens) == {"Bearer hf_secret"}
    hub.failure = (401, "")
    with pytest.raises(DownloadError) as caught:
        plan(Source(ID, token="hf_secret"))
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_keeps_what_came(
    repository: dict[str, bytes], error: type[BaseException], tmp_path: Path
) -> None:
    def interrupt(count: int) -> None:
        raise error

    with pytest.raises(error):
        fetched(plan(Source(ID), variant="fp16"), on_bytes=interrupt)
    kept = list((tmp_path / "cache").rglob("*.incomplete"))
    assert kept
    fetched(plan(Source(ID), variant="fp16"))
    assert not any(path.exists() for path in kept)


# --- where it does not fit


def test_what_does_not_fit_is_refused_before_it_begins(
    repository: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [plan(Source(ID), components=["unet"])]
    need = plans[0].missing
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, need))
    check_space(plans)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, need - 1))
    with pytest.raises(DownloadError, match=r"are to be fetched, and .* free in .*cache: make room for 1 B there"):
        check_space(plans)
    with pytest.raises(DownloadError, match="make room for"):
        check_space([*plans, *plans])


def test_what_is_here_needs_no_room(repository: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    fetched(plan(Source(ID), components=["unet"]))
    monkeypatch.setattr(download, "free_bytes", lambda folder: 0)
    check_space([plan(Source(ID), components=["unet"])])


@pytest.mark.parametrize(("number", "message"), [(28, "no space is left in .*cache"), (13, "cannot be stored in")])
def test_a_disk_that_refuses_is_told_with_the_way_out(
    repository: dict[str, bytes], number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(Source(ID), components=["unet"])

    def refuse(self: Path, *args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DownloadError, match=rf"{message}.*--cache-dir or HF_HOME"):
        fetched(planned)


def test_large_files_are_what_the_hub_keeps_apart() -> None:
    assert [len(digest(name, b"")) for name in ("a.json", f"a{LARGE[0]}")] == [40, 64]
