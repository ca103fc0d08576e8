"""The page about speed says what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_tables_of_speed_are_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "tables", raising=False)
    import tables

    page = (ROOT / "docs" / "speed.md").read_text()
    assert all(f"<!-- {name} -->" in page for name in tables.TABLES)
    assert tables.written(page) == page, "run: python benchmarks/tables.py --write"
