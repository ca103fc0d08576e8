from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from floyd.apps.cli.app import app
from floyd.apps.tuning.config import TuneConfig
from floyd.store.weights import read_file

SETTINGS = ["--steps", "3", "--batch", "2", "--rank", "1", "--precision", "fp32", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a cat {i}")
    return folder


def train(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_a_file_and_flags_make_a_run_and_its_result_is_printed(folder: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'model = "{folder}"\ndata = "{data}"\nsteps = 90\n')
    done = train(config, "--out", tmp_path / "run", *SETTINGS[:-1])
    assert done.exit_code == 0, done.exception
    assert done.stdout.strip() == str(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert "training: 3/3, in" in done.stderr
    assert {tensor.shape[0] for key, tensor in read_file(done.stdout.strip()).items() if ".lora_A." in key} == {1}


def test_ctrl_c_stops_after_the_step_and_the_same_command_goes_on(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", folder, "--data", data, *SETTINGS]
    assert train(*arguments, "--out", tmp_path / "whole").exit_code == 0

    class Impatient:
        def start(self, label: str, total: int, done: int = 0) -> None:
            """Not told."""

        def note(self, text: str) -> None:
            """Not told."""

        def step(self, count: int = 1, note: str = "") -> None:
            if "variance" in note:
                signal.raise_signal(signal.SIGINT)

    @contextmanager
    def pressing(*, quiet: bool) -> Iterator[Impatient]:
        yield Impatient()

    with monkeypatch.context() as patch:
        patch.setattr("floyd.apps.cli.tune.progress", pressing)
        stopped = train(*arguments, "--out", tmp_path / "parts")
    assert stopped.exit_code == 130
    assert stopped.stderr.splitlines()[-1] == "floyd: stopped after 1 of 3 steps; the same command goes on from there."
    assert train(*arguments, "--out", tmp_path / "parts").exit_code == 0
    one, other = (read_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "parts"))
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "data must be told"),
        (["--data", "nowhere", "--out", "x"], "data must be a folder of pictures"),
        (["--data", "x", "--out", "x", "--rank", "0"], "rank must be at least 1"),
        (["--data", "x", "--out", "x", "--batchsize", "2"], "--batchsize"),
        (["absent.toml", "--data", "x", "--out", "x"], "absent.toml cannot be read"),
    ],
)
def test_bad_arguments_are_one_line_and_no_work(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = train(*arguments)
    assert done.exit_code == 2, done.exception
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_optional_and_absent_is_said_in_a_line(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    done = train("--model", folder, "--data", data, "--out", tmp_path / "run", "--tensorboard", *SETTINGS)
    assert done.exit_code == 2
    assert "tensorboard = true needs tensorboard, which is not installed: pip install" in done.stderr


def test_every_setting_is_a_flag() -> None:
    import typer

    command: Any = typer.main.get_command(app)
    flags = {parameter.name for parameter in command.commands["train"].params}
    assert {each.name for each in fields(TuneConfig)} <= flags
