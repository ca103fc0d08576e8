"""`floyd plan`, and the tables of docs/memory.md that it prints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from floyd.apps.cli.app import app
from floyd.pipelines.cascade import Cascade
from floyd.runtime.budget import Budget
from floyd.runtime.machine import ANY_CARD

MEMORY = Path(__file__).parents[3] / "docs" / "memory.md"
TABLE = re.compile(r"<!-- floyd (plan [^\n]*) -->\n((?:\|[^\n]*\n)+)")


@pytest.fixture(autouse=True)
def _middle_class(monkeypatch: pytest.MonkeyPatch, no_network: None, tmp_path: Path) -> None:
    """Whatever this machine has: the same card for all, and nothing downloaded."""
    from huggingface_hub import constants

    monkeypatch.setattr("floyd.runtime.machine.this_machine", lambda: ANY_CARD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def floyd(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_row_for_each_network_and_what_it_comes_to(folder: Path) -> None:
    result = floyd("plan", str(folder), "--vram", "2GB", "--ram", "8GB")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == "component where dtype GB of it there peak GB s/image why".split()
    assert [line.split()[0] for line in lines[1:7]] == [
        "stage_1.text_encoder", "stage_1.unet", "stage_2.unet", "stage_3.text_encoder", "stage_3.unet", "stage_3.vae",
    ]  # fmt: skip
    assert "stays on the card: there is room for it" in lines[1]
    assert re.match(r"peak of VRAM \d\.\d\d GB, peak of RAM 1\.\d\d GB, about \S+ s per image on a card", lines[-1])


def test_as_json_it_is_the_plan(folder: Path) -> None:
    told = json.loads(floyd("plan", str(folder), "--vram", "2GB", "--ram", "8GB", "--json").output)
    assert told["vram_peak_bytes"][0] <= 2 * 10**9
    assert {row["where"] for row in told["components"]} == {"card"}
    both = json.loads(floyd("plan", str(folder), "--vram", "1GB,2GB", "--ram", "8GB", "--size", "96", "--json").output)
    assert [len(plan["components"]) for plan in both] == [3, 3]


def test_two_cards_and_none(folder: Path) -> None:
    assert "card 1: peak of VRAM" in floyd("plan", str(folder), "--vram", "2GB+2GB", "--ram", "8GB").output
    assert "on the CPU" in floyd("plan", "built-in", "--vram", "0", "--ram", "8GB").output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--vram", "lots"], "must be 'auto' or a size such as '8GB'"),
        (
            ["--vram", "50MB", "--ram", "8GB"],
            "0.0 GB of VRAM is too little for this: the smallest that works is 0.3 GB",
        ),
        (["--vram", "8GB", "--ram", "1GB"], "of RAM is too little for this: the smallest that works is 1.6 GB"),
        (["--size", "77"], "size must be one of 48, 96, 384"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder: Path, arguments: list[str], complaint: str) -> None:
    result = floyd("plan", str(folder), *arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_model_is_refused() -> None:
    assert "is not on this machine" in floyd("plan", "some/model", "--vram", "8GB").stderr


def test_generate_takes_a_budget(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    original = Cascade.from_pretrained

    def spy(*models: Any, **options: Any) -> Cascade:
        seen.append(options)
        return original(*models, torch_dtype="float32")

    monkeypatch.setattr(Cascade, "from_pretrained", spy)
    output = str(tmp_path / "a.png")
    common = ["generate", "a red circle", "-o", output, "--model", str(folder), "--size", "48", "--steps", "1", "-q"]
    assert floyd(*common, "--vram", "6GB", "--ram", "9GB").exit_code == 0
    assert seen[0]["memory"] == Budget(vram="6GB", ram="9GB")
    assert "device_map" not in seen[0]
    assert (seen[0]["memory_for"].size, seen[0]["memory_for"].count) == (48, 1)
    refused = floyd(*common, "--vram", "6GB", "--device", "cpu")
    assert "--device cpu says it, too: leave one out" in refused.stderr


@pytest.mark.parametrize("command", [match[1] for match in TABLE.finditer(MEMORY.read_text())])
def test_the_tables_of_the_docs_are_what_the_command_prints(command: str) -> None:
    printed = floyd(*shlex.split(command))
    assert printed.exit_code == 0, printed.output
    (table,) = [match[2] for match in TABLE.finditer(MEMORY.read_text()) if match[1] == command]
    assert table == printed.output


def test_the_docs_tell_every_size_of_card() -> None:
    commands = [match[1] for match in TABLE.finditer(MEMORY.read_text())]
    assert len(commands) == 2
    assert all("--vram 4GB,6GB,8GB,12GB,16GB,24GB" in command for command in commands)
