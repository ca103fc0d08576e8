"""Every Python block of the README and the docs runs, unless it says `notest`: those need weights of others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
BLOCK = re.compile(r"^```(?:python|py)[ \t]*(?P<flags>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks() -> list[pytest.param]:
    found = []
    for page in PAGES:
        for i, match in enumerate(BLOCK.finditer(page.read_text())):
            found.append(pytest.param(match["flags"], match["code"], id=f"{page.stem}-{i}"))
    return found


@pytest.mark.parametrize(("flags", "code"), blocks())
def test_a_block_of_the_docs_runs(flags: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile(code, "docs", "exec")
    if "notest" in flags.split():
        return  # it was parsed
    monkeypatch.chdir(tmp_path)
    exec(compiled, {"__name__": "docs"})


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
