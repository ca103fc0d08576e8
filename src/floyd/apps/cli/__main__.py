"""`python -m floyd.apps.cli`, for launchers that start a module."""

from __future__ import annotations

from floyd.apps.cli import main

main()
