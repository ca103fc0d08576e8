"""The command `floyd`."""

from __future__ import annotations

import sys


def main() -> None:
    """Where the installed script enters. Ctrl-C has its say even while the command is still being imported."""
    try:
        from floyd.apps.cli.app import app
    except KeyboardInterrupt:
        sys.exit(130)
    app(prog_name="floyd")
