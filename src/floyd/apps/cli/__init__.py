"""The command `floyd`."""

from __future__ import annotations

import atexit
import gc
import sys


def main() -> None:
    """Where the installed script enters. Ctrl-C has its say even while the command is still being imported."""
    try:
        from floyd.apps.cli.app import app
    except KeyboardInterrupt:
        sys.exit(130)
    atexit.register(gc.freeze)  # what lives then dies with the process: searching it for garbage is in vain
    app(prog_name="floyd")
