"""The command as a whole: help at once, one line for what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import floyd
from floyd.apps.cli.app import app
from floyd.apps.cli.refusals import Commands, refusing
from floyd.errors import CheckpointError, DownloadError

HEAVY = ("torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors")
COMMANDS = ("generate", "info", "judge", "eval", "train", "train-mini", "download", "plan", "doctor")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(floyd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["generate", "--help"],
        ["eval", "--help"],
        ["download", "--help"],
        ["doctor", "--help"],
        ["plan", "--help"],
        ["--version"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', [name for name in {HEAVY} if name in sys.modules]))\n"
        "from floyd.apps.cli import main\n"
        "main()"
    )
    done = run_python(code, *arguments)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "LOADED []" in done.stdout
    assert "floyd" in done.stdout


def test_help_names_every_command() -> None:
    assert tuple(command.name for command in app.registered_commands) == COMMANDS
    page = CliRunner().invoke(app, ["--help"]).stdout
    assert all(command in page for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "--help" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_breaks_its_lines_where_the_terminal_ends(command: str) -> None:
    page = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "70", "TERMINAL_WIDTH": "70"}).stdout
    lines = [line.strip() for line in re.split(r"\n(?:Arguments|Options):", page)[0].splitlines()]
    told = [(line, after) for line, after in pairwise(lines) if line and after]
    assert all(len(f"{line} {after.split()[0]}") > 64 for line, after in told), "a word would have fitted before"


@pytest.mark.parametrize("command", ["generate", "eval", "train", "train-mini", "download", "plan"])
def test_on_eighty_columns_the_explanations_have_half(command: str) -> None:
    page = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).stdout
    told = [line for line in page[page.index("\nOptions:") :].splitlines() if line.startswith(" " * 10)]
    assert told
    assert all(len(line) - len(line.lstrip()) <= 40 for line in told)
    assert all(len(line) <= 80 for line in page.splitlines())


def test_the_version_is_the_packages() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"floyd {floyd.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "No such command 'generat'"),
        (["generate"], "Missing argument"),
        (["generate", "a", "--sed", "1"], "No such option"),
        (["generate", "a", "--seed"], "--seed"),
        (["generate", "a", "--seed", "x"], "--seed"),
        (["generate", "a", "b"], "unexpected extra argument"),
        (["train-mini"], "Missing option"),
    ],
)
def test_a_misused_command_says_so_in_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("floyd: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == ""


def command_that_raises(error: BaseException, *, while_checking: bool) -> typer.Typer:
    other = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @other.command("fail")
    def fail() -> None:
        if while_checking:
            with refusing():
                raise error
        raise error

    @other.callback()
    def nothing() -> None:
        """A group of one command."""

    return other


@pytest.mark.parametrize("error", [ValueError("too\n  large"), TypeError("too large"), CheckpointError("too large")])
def test_what_is_refused_while_checking_is_one_line(error: Exception) -> None:
    result = CliRunner().invoke(command_that_raises(error, while_checking=True), ["fail"])
    assert (result.exit_code, result.stderr) == (2, "floyd: too large\n")


def test_floyds_own_errors_are_one_line_at_any_time() -> None:
    result = CliRunner().invoke(command_that_raises(CheckpointError("broken"), while_checking=False), ["fail"])
    assert (result.exit_code, result.stderr) == (2, "floyd: broken\n")


@pytest.mark.parametrize("while_checking", [True, False])
def test_a_hub_that_does_not_deliver_is_not_the_callers_fault(while_checking: bool) -> None:
    failing = command_that_raises(DownloadError("the hub is down"), while_checking=while_checking)
    result = CliRunner().invoke(failing, ["fail"])
    assert (result.exit_code, result.stderr) == (1, "floyd: the hub is down\n")


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), ZeroDivisionError("as well")])
def test_unexpected_errors_keep_their_traceback(error: Exception) -> None:
    result = CliRunner().invoke(command_that_raises(error, while_checking=False), ["fail"])
    assert result.exception is error
    assert result.stderr == ""


def test_an_interruption_is_one_line_and_130() -> None:
    result = CliRunner().invoke(command_that_raises(KeyboardInterrupt(), while_checking=True), ["fail"])
    assert (result.exit_code, result.stderr) == (130, "floyd: interrupted; nothing was written.\n")
