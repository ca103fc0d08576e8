"""The command against a hub on localhost: what it fetches, and how it says that it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub_stub import Fault, Hub, files_in
from typer.testing import CliRunner, Result

from floyd.apps.cli.app import app
from floyd.errors import DownloadError
from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.cascade import Cascade
from floyd.pipelines.deepfloyd_if import IFPipeline
from floyd.store.cache import cached_pipelines

Files = dict[str, dict[str, bytes]]  # by repository and name

STAGES = {
    "stage_1": "DeepFloyd/IF-I-XL-v1.0",
    "stage_2": "DeepFloyd/IF-II-L-v1.0",
    "stage_3": "stabilityai/stable-diffusion-x4-upscaler",
}
ID = STAGES["stage_1"]
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="module")
def repositories(
    cascade: Cascade, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """The tiny cascade as the hub has the real one: two variants, pickled twins, T5 with the second stage, too."""
    root = tmp_path_factory.mktemp("repositories")
    shutil.copytree(folder, root, dirs_exist_ok=True)
    for name, stage in cascade.stages.items():
        stage.save_pretrained(root / name, variant="fp16")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(root / "stage_1" / part, root / "stage_2" / part)
    indices = [root / name / "model_index.json" for name in ("stage_1", "stage_2")]
    first, second = (json.loads(path.read_text()) for path in indices)
    indices[1].write_text(json.dumps({**second, **{part: first[part] for part in ("text_encoder", "tokenizer")}}))
    made = {}
    for name, repository in STAGES.items():
        files = files_in(root / name)
        files |= {name.replace(".safetensors", ".bin"): b"pickle" for name in files if name.endswith(".safetensors")}
        made[repository] = {**files, "pytorch_model.bin": b"the original's", "README.md": b"a card"}
    return made


@pytest.fixture
def stocked(hub: Hub, repositories: Files) -> Hub:
    hub.repositories.update(repositories)
    return hub


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["download", *arguments])


def refused(*arguments: str, code: int = 1) -> str:
    """The one line that a user reads."""
    result = run(*arguments)
    assert result.exit_code == code, (result.exception, result.stderr)
    assert isinstance(result.exception, SystemExit)  # and no traceback
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("floyd: ")
    return last


def test_a_cascade_is_fetched_once_and_works_offline(stocked: Hub, tmp_path: Path) -> None:
    result = run("if-xl", "--variant", "fp16")
    assert result.exit_code == 0, result.stderr
    assert [Path(line).is_dir() for line in result.stdout.splitlines()] == [True] * 3
    assert 'now: floyd generate "a photo of a red panda" --model if-xl --variant fp16' in result.stderr
    assert not any(name.endswith(".bin") or name == "README.md" for name in stocked.fetched)
    assert len([name for name in stocked.fetched if name.startswith("text_encoder/model")]) == 2  # T5 and CLIP
    assert {one.id: one.whole for one in cached_pipelines(tmp_path / "cache")} == {
        STAGES["stage_1"]: ["fp16"],
        STAGES["stage_2"]: [],  # its text encoder is the first stage's
        STAGES["stage_3"]: ["fp16"],
    }
    stocked.failure = (500, "")
    cascade = Cascade.from_pretrained(*STAGES.values(), variant="fp16", local_files_only=True)
    assert cascade.sizes == {"stage_1": 48, "stage_2": 96, "stage_3": 384}
    drawn = cascade("a red circle", size=96, steps=2)
    assert drawn.images[0].size == (96, 96)


def test_a_second_stage_whose_t5_was_left_out_says_what_to_pass(stocked: Hub) -> None:
    assert run("if-xl", "--variant", "fp16", "--quiet").exit_code == 0
    second: dict[str, Any] = {"variant": "fp16", "local_files_only": True}
    with pytest.raises(DownloadError, match=r"no files for text_encoder .* text_encoder=None to do without"):
        DiffusionPipeline.from_pretrained(STAGES["stage_2"], **second)
    second |= dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    assert DiffusionPipeline.from_pretrained(STAGES["stage_2"], **second).unet.config.in_channels == 6


def test_what_is_here_is_not_fetched_again(stocked: Hub) -> None:
    assert run(ID, "--variant", "fp16").exit_code == 0
    stocked.fetched.clear()
    result = run(ID, "--variant", "fp16", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert stocked.fetched == ["model_index.json"]  # to know what to ask for


def test_a_dry_run_lists_and_fetches_nothing(stocked: Hub, tmp_path: Path) -> None:
    result = run("if-xl", "--variant", "fp16", "--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith(tuple(STAGES.values()))] == list(STAGES.values())
    assert sum(UNET in line for line in lines) == 3
    assert sum("without text_encoder" in line for line in lines) == 1
    assert lines[-1].startswith("to fetch: ")
    assert not (tmp_path / "cache").exists()


def test_components_can_be_chosen_or_left_out(stocked: Hub, tmp_path: Path) -> None:
    assert run(ID, "--without", "text_encoder, tokenizer", "--cache-dir", str(tmp_path / "own")).exit_code == 0
    assert not any(name.startswith(("text_encoder/", "tokenizer/")) for name in stocked.fetched)
    options: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "local_files_only": True}
    assert IFPipeline.from_pretrained(ID, cache_dir=tmp_path / "own", **options).unet.config.sample_size == 48
    stocked.fetched.clear()
    assert run(ID, "--components", "scheduler").exit_code == 0
    assert set(stocked.fetched) == {"model_index.json", "scheduler/scheduler_config.json"}


def test_a_revision_is_the_hubs(stocked: Hub) -> None:
    assert run(ID, "--revision", "main", "--components", "scheduler").exit_code == 0
    assert f"{ID} has no revision 'v9'" in refused(ID, "--revision", "v9")


def test_a_download_that_breaks_off_is_gone_on_with(stocked: Hub, repositories: Files) -> None:
    half = len(repositories[ID][UNET]) // 2
    stocked.faults[UNET] = [Fault(cut_at=half)]
    line = refused(ID, "--variant", "fp16", "--retries", "0")
    assert f"{ID} could not be fetched" in line
    assert f"of {UNET} are kept, and the same again goes on from there." in line
    with pytest.raises(DownloadError):
        IFPipeline.from_pretrained(ID, variant="fp16", local_files_only=True)
    assert run(ID, "--variant", "fp16", "--retries", "0").exit_code == 0
    assert stocked.ranges == [f"bytes={half}-"]
    pipeline = IFPipeline.from_pretrained(ID, variant="fp16", local_files_only=True)
    assert torch.isfinite(pipeline.unet.conv_in.weight).all()


def test_it_tries_again_and_says_so(stocked: Hub) -> None:
    stocked.faults[UNET] = [Fault(429, {"Retry-After": "0"}), Fault(503, {"Retry-After": "0"})]
    result = run(ID, "--variant", "fp16")
    assert result.exit_code == 0
    assert f"{ID}: the hub answered HTTP 429; trying again in 0 s (1 of 5)" in result.stderr
    assert f"{ID}: the hub answered HTTP 503; trying again in 0 s (2 of 5)" in result.stderr


def test_progress_is_told_in_bytes(stocked: Hub) -> None:
    result = run(ID, "--variant", "fp16")
    [line] = [line for line in result.stderr.splitlines() if line.startswith(ID)]
    assert "MB/" in line
    assert "MB, in 0:0" in line


@pytest.mark.parametrize(
    ("status", "code", "headers", "words"),
    [
        (401, "GatedRepo", {}, ["is gated: log in to http", f"/{ID} and accept the licence there", "`hf auth login`"]),
        (403, "GatedRepo", {}, ["is gated", f"/{ID} and accept the licence there"]),
        (401, "RepoNotFound", {}, ["was not found, or is private: check the name at http", "`hf auth login`"]),
        (404, "RepoNotFound", {}, ["was not found, or is private: check the name at http"]),
        (403, "", {}, ["is not open to you (HTTP 403)"]),
        (429, "", {"Retry-After": "3600"}, ["too often (HTTP 429): try again in 3600 s; files that came are kept"]),
        (504, "", {"Retry-After": "3600"}, ["the hub answered HTTP 504: try again later"]),
    ],
)
@pytest.mark.parametrize("only_files", [True, False])
def test_a_hub_that_refuses_is_one_line_with_what_to_do(
    stocked: Hub, status: int, code: str, headers: dict[str, str], words: list[str], only_files: bool
) -> None:
    stocked.failure, stocked.failure_headers, stocked.only_files_fail = (status, code), headers, only_files
    line = refused(ID)
    assert ID in line
    assert all(word in line for word in words), line


def test_a_bad_token_is_one_line_without_the_token(stocked: Hub) -> None:
    stocked.failure = (401, "")
    line = refused(ID, "--token", "hf_secret")
    assert "does not accept the token (HTTP 401)" in line
    assert "hf_secret" not in line
    assert "Bearer hf_secret" in stocked.tokens


def test_no_network_is_one_line(stocked: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "could not be fetched (ConnectError: " in (line := refused(ID))
    assert "check the network" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"{ID} cannot be downloaded: floyd is offline." in refused(ID)


def test_a_full_disk_is_one_line_before_anything_is_fetched(stocked: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("floyd.store.download.free_bytes", lambda folder: 1000)
    line = refused(ID, "--variant", "fp16")
    assert "are to be fetched, and 1 kB are free in" in line
    assert "choose another place with --cache-dir or HF_HOME" in line
    assert stocked.fetched == ["model_index.json"]


def test_a_disk_that_fills_up_is_one_line(stocked: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("floyd.store.transfer._Part.extend", full)
    assert f"{ID} does not fit on the disk: no space is left in" in refused(ID, "--retries", "3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument"),
        (["if-xs"], "if-xs is neither an existing folder nor a hub id of the form 'org/name'"),
        (["{tmp}"], "is a folder of this machine; there is nothing to download"),
        ([ID, "--variant", "bf16"], "no weights of the variant 'bf16', only fp16"),
        ([ID, "--without", "vae"], "has no component vae; it has"),
        ([ID, "--components", "unet,,vae"], "Components are named as in unet,scheduler"),
        ([ID, "--components", "unet", "--without", "scheduler"], "not both"),
        (["if-xl", "--revision", "main"], "A revision is one model's"),
        ([ID, "--retries", "-1"], "--retries"),
    ],
)
def test_what_is_asked_wrongly_is_refused(stocked: Hub, arguments: list[str], words: str, tmp_path: Path) -> None:
    assert words in refused(*(argument.format(tmp=tmp_path) for argument in arguments), code=2)
    assert not (tmp_path / "cache").exists()


def test_an_interruption_says_that_it_can_be_gone_on_with(stocked: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("floyd.apps.cli.progress._Lines.step", interrupt)
    line = refused(ID, code=130)
    assert line == "floyd: interrupted; what came is kept, and the same command goes on from there."


@pytest.mark.parametrize("command", [["generate", "a", "-o", "{tmp}/a.png"], ["eval", "--prompts", "1"]])
def test_other_commands_say_the_same_of_a_model_that_cannot_be_fetched(
    stocked: Hub, command: list[str], tmp_path: Path
) -> None:
    stocked.failure = (403, "GatedRepo")
    result = CliRunner().invoke(app, [*(part.format(tmp=tmp_path) for part in command), "--model", ID])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"floyd: {ID} is gated: log in to http")


def test_what_was_downloaded_draws_by_its_short_name(stocked: Hub, tmp_path: Path) -> None:
    assert run("if-xl", "--variant", "fp16", "-q").exit_code == 0
    stocked.failure = (500, "")
    picture = str(tmp_path / "a.png")
    arguments = ["a red circle", "-o", picture, "--model", "if-xl", "--variant", "fp16", "--size", "48", "--steps", "1"]
    result = CliRunner().invoke(app, ["generate", *arguments])
    assert result.exit_code == 0, result.stderr
    story = json.loads(CliRunner().invoke(app, ["info", picture, "--json"]).stdout)
    assert (story["model"], story["variant"]) == (", ".join(STAGES.values()), "fp16")


def test_the_built_in_model_has_no_variants(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["generate", "a", "-o", str(tmp_path / "a.png"), "--variant", "fp16"])
    assert result.exit_code == 2
    assert "The built-in checkpoint has no variants" in result.stderr


def test_checkpoints_in_the_layout_of_the_real_ones_work_offline(
    hub: Hub, tiny_hub_cache: Path, tmp_path: Path
) -> None:
    for repository in STAGES.values():
        snapshots = tiny_hub_cache / f"models--{repository.replace('/', '--')}" / "snapshots"
        hub.repositories[repository] = files_in(next(snapshots.iterdir()))
    result = run("if-xl", "--variant", "fp16")
    assert result.exit_code == 0, result.stderr
    assert len([name for name in hub.fetched if name.startswith("safety_checker/model")]) == 1
    hub.failure = (500, "")
    cascade = Cascade.from_pretrained(*STAGES.values(), variant="fp16", local_files_only=True)
    assert cascade("a red circle", size=32, steps=2).images[0].size == (32, 32)
