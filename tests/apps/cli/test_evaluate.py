from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from floyd.apps.cli.app import app
from floyd.apps.cli.evaluate import lines
from floyd.apps.evaluate import Asked, Drawn, Report, Score, Share
from floyd.images.metadata import read_info
from floyd.pipelines.cascade import Cascade
from floyd.scenes.render import render
from floyd.scenes.scene import Background, Scene


class Knower:
    """Renders the scene itself, but nothing at all where there are three things."""

    sizes = (64, 128)

    def __init__(self, *args: Any) -> None:
        pass

    def draw(self, asked: Sequence[Asked]) -> list[Drawn]:
        return [Drawn(render(one.scene if one.split != "three" else Scene((), Background()), 64)) for one in asked]

    def enlarge(self, asked: Sequence[Asked], drawn: Sequence[Drawn], size: int) -> list[Drawn]:
        return [Drawn(render(one.scene, size)) for one in asked]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, cascade: Cascade) -> None:
    """A painter whose score is known."""
    monkeypatch.setattr("floyd.apps.cli.evaluate.load", lambda *args, **options: cascade)
    monkeypatch.setattr("floyd.apps.evaluate.CascadePainter", Knower)


@pytest.mark.usefixtures("known")
def test_the_numbers_are_printed_and_written(tmp_path: Path, folder: Path) -> None:
    arguments = ["--prompts", "16", "--sizes", "64,128", "--json", str(tmp_path / "a.json"), "--model", str(folder)]
    result = CliRunner().invoke(app, ["eval", *arguments, "--seed", "3"])
    assert result.exit_code == 0, result.exception
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0][:3] == ["right", "count", "shapes"]
    assert [row[:3] for row in rows[1:4]] == [
        ["one", "100.0%", "4/4"],
        ["two", "100.0%", "4/4"],
        ["three", "0.0%", "0/4"],
    ]
    assert rows[4][:4] == ["held", "out", "100.0%", "4/4"]
    assert rows[5][:3] == ["all", "75.0%", "12/16"]
    assert result.stdout.splitlines()[-1] == "at 128 px the same scene: 100.0% (12/12 of the right ones)"
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["total"]["everything"] == {"right": 12, "of": 16, "share": 0.75}
    assert (content["model"], content["seed"], content["prompts"]) == (str(folder), 3, 16)
    assert content["model_hash"].startswith("sha256:")


@pytest.mark.usefixtures("known")
def test_rendered_scenes_are_all_right(folder: Path) -> None:
    result = CliRunner().invoke(app, ["eval", "--prompts", "8", "--rendered", "--model", str(folder)])
    assert result.exit_code == 0, result.exception
    assert result.stdout.splitlines()[-1].split()[:3] == ["all", "100.0%", "8/8"]


@pytest.mark.usefixtures("known")
def test_the_sheets_show_right_and_wrong_pictures_and_say_which(tmp_path: Path, folder: Path) -> None:
    arguments = ["--prompts", "16", "--pictures", str(tmp_path / "sheets"), "--model", str(folder), "--quiet"]
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 0, result.exception
    assert result.stderr == ""
    with Image.open(tmp_path / "sheets" / "right.png") as right, Image.open(tmp_path / "sheets" / "wrong.png") as wrong:
        assert (right.size, wrong.size) == ((640, 128), (640, 64))
    info = read_info(tmp_path / "sheets" / "wrong.png")
    assert info["shown"] == "4 of 4"
    asked = json.loads(info["pictures"])
    assert {one["split"] for one in asked} == {"three"}
    assert all({"count", "shapes", "colors"} <= set(one["wrong"]) for one in asked)


def test_a_cascade_is_evaluated(tmp_path: Path, folder: Path) -> None:
    """Nothing is replaced here: noise is painted, and nothing is right."""
    arguments = ["--prompts", "4", "--steps", "1", "--batch", "3", "--model", str(folder), "--device", "cpu"]
    arguments += ["--quantization", "int8"]
    result = CliRunner().invoke(app, ["eval", *arguments, "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.exception
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["total"]["everything"] == {"right": 0, "of": 4, "share": 0.0}
    assert content["quantization"] == "int8"
    assert result.stderr.splitlines()[-1].startswith("pictures: 4/4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "0"], "--prompts"),
        (["--sizes", "big"], "sizes must be as in 64,256,1024"),
        (["--sizes", "48,384"], "sizes must be those of the stages from the first on, 48,96,384; got 48,384"),
        (["--steps", "1,2"], "steps must be one value"),
        (["--json", "/nowhere/at/all.json"], "There is no folder /nowhere/at"),
        (["--pictures", "/nowhere/at/all"], "There is no folder /nowhere/at"),
        (["--json", "{tmp}"], "is a folder; name a file in it"),
        (["--pictures", "{tmp}/file.txt"], "is a file; name a folder"),
    ],
)
def test_bad_arguments_are_one_line(
    cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    (tmp_path / "file.txt").touch()
    monkeypatch.setattr("floyd.apps.cli.evaluate.load", lambda *args, **options: cascade)
    result = CliRunner().invoke(app, ["eval", *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert result.exit_code == 2, result.exception
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_table_has_a_dash_where_nothing_was_claimed() -> None:
    score = Score(Share(1, 2), {"count": Share(2, 2), "relation": Share(0, 0)})
    assert lines(Report(score, {"held_out": score}, {256: Share(1, 1)})) == [
        "          right        count  relation",
        "held out  50.0%  1/2  100.0%         -",
        "all       50.0%  1/2  100.0%         -",
        "at 256 px the same scene: 100.0% (1/1 of the right ones)",
    ]
