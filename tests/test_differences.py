"""Every difference from the incumbent names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "differences.md"


def test_every_difference_is_held_by_a_test_that_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    there = {name for path in TESTS.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) > 20
    assert named <= there, f"no such test: {sorted(named - there)}"


def test_every_row_names_one() -> None:
    rows = [
        line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "the incumbent | floyd" not in line
    ]
    without = [row for row in rows if "`test_" not in row]
    assert without == []
