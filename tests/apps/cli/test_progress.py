from __future__ import annotations

import io
import sys

import pytest

from floyd.apps.cli import progress as module
from floyd.apps.cli.progress import progress


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_away_from_a_terminal_a_line_is_written_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bars:
        bars.start("64 px", 20)
        for _ in range(20):
            clock.now_s += 4
            bars.step(1, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "64 px: 3/20, 1:08 left  loss 0.5"
    assert lines[-1] == "64 px: 20/20, in 1:20  loss 0.5"
    assert len(lines) == 7


def test_steps_made_before_do_not_make_the_rest_look_faster(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bars:
        bars.start("stage_1", 1000, done=900)
        clock.now_s += 3600
        bars.step(50)
    assert capsys.readouterr().err == "stage_1: 950/1000, 1:00:00 left\n"


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as bars:
        bars.start("64 px", 1)
        bars.step()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress() as bars:
        bars.start("64 px", 2)
        bars.step(1, "loss 0.5")
        bars.step(1, "loss 0.25")
    assert "64 px" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
    assert "loss 0.25" in terminal.getvalue()


def test_bytes_are_counted_as_the_hub_counts_them(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(in_bytes=True) as bars:
        bars.start("org/name", 8_600_000_000, done=600_000_000)
        clock.now_s += 20
        bars.step(2_000_000_000)
        bars.note("the connection broke off")
        clock.now_s += 11
        bars.step(-2_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "org/name: 2.6 GB/8.6 GB, 1:00 left",
        "org/name: the connection broke off",
        "org/name: 600 MB/8.6 GB, begun",
    ]


def test_quiet_is_quiet_about_notes_too(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True, in_bytes=True) as bars:
        bars.start("org/name", 1)
        bars.note("the connection broke off")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_bytes_and_notes_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    with progress(in_bytes=True) as bars:
        bars.start("org/name", 2_000_000)
        bars.step(1_000_000)
        bars.note("the connection broke off")
    assert "1.0/2.0 MB" in terminal.getvalue()
    assert "the connection broke off" in terminal.getvalue()
