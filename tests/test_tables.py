"""The docs say what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_tables_of_the_docs_are_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "tables", raising=False)
    import tables

    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    assert all(any(f"<!-- {name} -->" in page for page in pages) for name in tables.TABLES)
    assert [tables.written(page) for page in pages] == pages, "run: python benchmarks/tables.py --write"
