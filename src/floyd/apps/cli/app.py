"""`floyd generate`, `info`, `judge`, `eval`, `train`, `train-mini`, `download`, `plan` and `doctor`.

Whatever takes time to import (torch, transformers, PIL, numpy) is imported by the command that needs it: help is
immediate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from floyd.apps.cli.doctor import doctor
from floyd.apps.cli.download import download
from floyd.apps.cli.evaluate import evaluate
from floyd.apps.cli.generate import generate
from floyd.apps.cli.info import info, judge
from floyd.apps.cli.plan import plan
from floyd.apps.cli.refusals import Commands
from floyd.apps.cli.train import train_mini
from floyd.apps.cli.tune import train

app = typer.Typer(
    cls=Commands,
    name="floyd",
    help="DeepFloyd IF: from a text to a picture of 64, 256 or 1024 pixels.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes leave a terminal of 80 columns 20 for the words
)


def _flowing(text: str | None) -> str:
    """Paragraphs of one line each: a terminal breaks them where it ends, not where our source does."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


_COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "info": info,
    "judge": judge,
    "eval": evaluate,
    "train": train,
    "train-mini": train_mini,
    "download": download,
    "plan": plan,
    "doctor": doctor,
}
for _name, _command in _COMMANDS.items():
    _help = _flowing(_command.__doc__)
    app.command(_name, help=_help, short_help=_help.split("\n\n")[0])(_command)


def _version(is_asked: bool) -> None:
    if is_asked:
        from floyd import __version__

        print(f"floyd {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def floyd(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        if page := ctx.get_help():
            print(page)
        raise typer.Exit
