from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner

from floyd.apps.cli.app import app
from floyd.apps.doctor import Finding

FINE = Finding("python", "ok", "3.11", facts={"version": "3.11"})
CACHE = Finding("cache", "note", "1 GB", "Go on with it.", ("org/name: fp16 whole",))
DRAWN = Finding("picture", "ok", "64 px took 1.0 s on cpu")
BROKEN = Finding("picture", "wrong", "RuntimeError: no", "Report it.")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, bool]]]:
    def set_up(*findings: Finding) -> list[tuple[str, bool]]:
        asked: list[tuple[str, bool]] = []

        def examine(device: str = "auto", *, online: bool = False) -> Iterator[Finding]:
            asked.append((device, online))
            yield from findings

        monkeypatch.setattr("floyd.apps.doctor.examine", examine)
        return asked

    return set_up


def test_a_machine_that_draws_is_code_0_and_ends_with_the_verdict(found: Callable[..., list[tuple[str, bool]]]) -> None:
    asked = found(FINE, CACHE, DRAWN)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "ok     python    3.11",
        "note   cache     1 GB",
        "                 org/name: fp16 whole",
        "                 -> Go on with it.",
        "ok     picture   64 px took 1.0 s on cpu",
        "floyd can draw here: 64 px took 1.0 s on cpu. Notes on cache.",
    ]
    assert asked == [("auto", False)]


def test_a_machine_that_does_not_draw_is_code_1(found: Callable[..., list[tuple[str, bool]]]) -> None:
    found(FINE, BROKEN)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-3:] == [
        "WRONG  picture   RuntimeError: no",
        "                 -> Report it.",
        "floyd cannot draw here: RuntimeError: no",
    ]


@pytest.mark.parametrize(("last", "code"), [(DRAWN, 0), (BROKEN, 1)])
def test_as_json_it_is_one_object(found: Callable[..., list[tuple[str, bool]]], last: Finding, code: int) -> None:
    asked = found(FINE, last)
    result = CliRunner().invoke(app, ["doctor", "--json", "--device", "cpu", "--online"])
    assert result.exit_code == code
    told = json.loads(result.stdout)
    assert told["can_draw"] is (code == 0)
    assert told["verdict"].startswith("floyd can")
    assert told["findings"][0] == {"name": "python", "state": "ok", "says": "3.11", "advice": "", "version": "3.11"}
    assert asked == [("cpu", True)]
