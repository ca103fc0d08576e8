from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from floyd.apps.cli.app import app
from floyd.apps.mini import recipe, stage_one, text
from floyd.store.weights import read_file
from floyd.training.loop import Phase

SCALE = "0.5"  # of these, for the tests
TEXT = (Phase(num_steps=8, batch_size=4, size=40, rate=3e-3, last_rate=1e-3),)
STAGE_ONE = (Phase(num_steps=4, batch_size=2, size=16, rate=1e-3, last_rate=1e-3),)
WEIGHTS = ("text_encoder/model.safetensors", "unet_1/diffusion_pytorch_model.safetensors")


@pytest.fixture(autouse=True)
def _a_short_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "NUM_CAPTIONS", 300)
    monkeypatch.setattr(text, "LOOP", replace(text.LOOP, phases=TEXT))
    small = {**stage_one.UNET, "block_out_channels": (8, 16, 32, 32)}
    monkeypatch.setattr(stage_one, "UNET", small)
    monkeypatch.setattr(stage_one, "LOOP", replace(stage_one.LOOP, phases=STAGE_ONE, precision="fp32"))


def train(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["train-mini", "--out", str(out), "--scale", SCALE, *arguments])


class Impatient:
    """Presses Ctrl-C during the given step of every run."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.labels: list[tuple[str, int, int]] = []

    def start(self, label: str, total: int, done: int = 0) -> None:
        self.labels.append((label, total, done))

    def step(self, count: int = 1, note: str = "") -> None:
        self.left -= count
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", "--parts", "text,stage_1", "--quiet")
    assert (whole.exit_code, whole.stderr) == (0, ""), whole.exception

    impatient: list[Impatient] = []
    for step in (1, 2, 2):  # in the first part, at its end, in the second part
        with monkeypatch.context() as patch:

            @contextmanager
            def pressing(*, quiet: bool, step: int = step) -> Iterator[Impatient]:
                impatient.append(Impatient(step))
                yield impatient[-1]

            patch.setattr("floyd.apps.cli.train.progress", pressing)
            stopped = train(tmp_path / "parts", "--parts", "text,stage_1")
        assert stopped.exit_code == 130
        assert "the same command goes on from there" in stopped.stderr.splitlines()[-1]
    resumed = train(tmp_path / "parts", "--parts", "text,stage_1")
    assert resumed.exit_code == 0, resumed.exception

    assert [one.labels[-1] for one in impatient] == [("text", 4, 0), ("text", 4, 1), ("stage_1", 2, 0)]
    for name in WEIGHTS:
        one, other = (read_file(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_stopping_says_how_far_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def pressing(*, quiet: bool) -> Iterator[Impatient]:
        yield Impatient(3)

    monkeypatch.setattr("floyd.apps.cli.train.progress", pressing)
    before = signal.getsignal(signal.SIGINT)
    told = train(tmp_path, "--parts", "text").stderr.splitlines()
    assert told[0].startswith("floyd: stopping after this step")
    assert told[1] == "floyd: stopped after 3 of 4 steps of text; the same command goes on from there."
    assert signal.getsignal(signal.SIGINT) is before


def test_parts_that_are_missing_are_named_and_nothing_is_put_together(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    result = train(tmp_path, "--parts", "text")
    assert result.exit_code == 0, result.exception
    assert signal.getsignal(signal.SIGINT) is before
    assert (
        result.stderr.splitlines()[-1]
        == "floyd: not put together: stage_1, stage_2, vae, stage_3 is yet to be trained."
    )
    assert result.stderr.splitlines()[0].startswith("text: 4/4, in ")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "text,stage_4"], "parts must be of text, stage_1, stage_2, vae, stage_3, student, got 'stage_4'"),
        (["--parts", "stage_1"], "stage_1 builds on text"),
        (["--parts", "stage_1,text"], "stage_1 builds on text"),
        (["--parts", "text", "--assemble"], "--assemble needs all parts"),
        (["--scale", "0"], "scale must be above 0"),
        (["--scale", "nan"], "scale must be above 0"),
        (["--device", "toaster"], "toaster"),
        (["--threads", "0"], "--threads"),
        (["--start", "nowhere"], "--start nowhere is no folder of a cascade"),
    ],
)
def test_bad_arguments_are_one_line_and_no_work(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = train(tmp_path / "run", *arguments)
    assert result.exit_code == 2, result.exception
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_with_another_scale(tmp_path: Path) -> None:
    train(tmp_path, "--parts", "text", "--quiet")
    result = CliRunner().invoke(app, ["train-mini", "--out", str(tmp_path), "--scale", "0.25"])
    assert result.exit_code == 2
    assert "was begun with scale 0.5, got scale 0.25" in result.stderr


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = train(tmp_path / "file")
    assert result.exit_code == 2
    assert "is a file; name a folder" in result.stderr
