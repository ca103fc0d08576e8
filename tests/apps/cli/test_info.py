from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from floyd.apps.cli.app import app
from floyd.images.metadata import save_png
from floyd.scenes.render import render
from floyd.scenes.scene import Background, Scene, Thing

STORY = {"prompt": "a cat, 猫", "seed": "0", "Software": "floyd 1.2.3"}
SCENE = Scene(
    (Thing("circle", "red", "large", 0.3, 0.3, 0.22), Thing("ring", "blue", "small", 0.36, 0.75, 0.11)),
    Background("gradient", "white", "gray"),
)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    save_png(Image.fromarray(render(SCENE, 64)), path, STORY)
    return path


def test_info_prints_what_made_a_picture(picture: Path) -> None:
    result = CliRunner().invoke(app, ["info", str(picture)])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == ["prompt    a cat, 猫", "seed      0", "Software  floyd 1.2.3"]


def test_info_as_json_is_read_back(picture: Path) -> None:
    assert json.loads(CliRunner().invoke(app, ["info", str(picture), "--json"]).stdout) == STORY


def test_judge_says_what_a_picture_shows(picture: Path) -> None:
    lines = CliRunner().invoke(app, ["judge", str(picture)]).stdout.splitlines()
    assert [line.split(" (match")[0] for line in lines] == [
        "a large red circle at 30% 30%",
        "a small blue ring at 36% 75%",
        "on a background that fades from white to gray",
    ]


def test_judge_says_if_there_is_nothing(tmp_path: Path) -> None:
    save_png(Image.fromarray(np.full((64, 64, 3), 250, np.uint8)), tmp_path / "empty.png")
    result = CliRunner().invoke(app, ["judge", str(tmp_path / "empty.png")])
    assert result.stdout.splitlines() == ["nothing", "on a white background"]


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("info", "absent.png", "There is no file"),
        ("info", ".", "There is no file"),
        ("info", "noise.png", "cannot be read as a PNG"),
        ("info", "a.jpg", "cannot be read as a PNG"),
        ("info", "silent.png", "does not say what made it"),
        ("judge", "absent.png", "There is no file"),
        ("judge", "noise.png", "not a picture"),
        ("judge", "silent.png", "picture must be uint8 of H x H x 3 with H >= 48"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, command: str, name: str, message: str) -> None:
    (tmp_path / "noise.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "silent.png")
    result = CliRunner().invoke(app, [command, str(tmp_path / name)])
    assert result.exit_code == 2, result.exception
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
