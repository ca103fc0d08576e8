"""How the command says no: one line on stderr, and exit code 2 for what was asked, 1 for a hub that did not deliver,
or 130 for Ctrl-C.

Any other exception is a fault of floyd's own, and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from floyd.errors import DownloadError, FloydError

FAILED = 1
REFUSED = 2
INTERRUPTED = 130  # as shells have it: 128 + SIGINT

UsageError: Any = typer.BadParameter.__bases__[0]  # typer exports only this heir of it, from wherever it has click


@contextmanager
def refusing() -> Iterator[None]:
    """Around whatever looks at arguments before any work: there, these errors are the caller's."""
    try:
        yield
    except DownloadError:
        raise
    except (FloydError, ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def say(text: str) -> None:
    """One line on stderr."""
    print("floyd:", " ".join(text.split()), file=sys.stderr)


class Commands(TyperGroup):
    """A group of commands that refuses as is said at the head of this file."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except UsageError as error:
            say(error.format_message())
            code = REFUSED
        except FloydError as error:
            say(str(error))
            code = FAILED if isinstance(error, DownloadError) else REFUSED
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            say(str(interrupt) or "interrupted; nothing was written.")
            raise typer.Exit(INTERRUPTED) from None
