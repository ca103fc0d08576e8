"""floyd stands alone: the incumbent is what the tests compare with, never what the package runs on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
FILES = sorted(SRC.rglob("*.py"))
IMPORTERS = {"import_module", "__import__", "find_spec"}


def modules_imported(source: str) -> Iterator[str]:
    """By statement, and by a call of importlib's with the name spelt out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTERS:
            yield from (
                word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
            )


def imports_diffusers(source: str) -> bool:
    return any(module.split(".")[0] == "diffusers" for module in modules_imported(source))


def test_there_is_source_to_read() -> None:
    assert SRC / "floyd" / "__init__.py" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_a_file_does_not_import_diffusers(path: Path) -> None:
    assert not imports_diffusers(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import diffusers",
        "import torch, diffusers.utils as utils",
        "from diffusers import IFPipeline",
        "def late():\n    from diffusers.models import attention",
        "import importlib\nimportlib.import_module('diffusers.utils')",
        "from importlib import import_module\nimport_module('diffusers')",
        "__import__('diffusers')",
    ],
)
def test_a_planted_import_is_found(source: str) -> None:
    assert imports_diffusers(source)


@pytest.mark.parametrize("source", ["LIBRARY = 'diffusers'", "import diffusers_like", "from floyd import diffusion"])
def test_the_name_alone_is_no_import(source: str) -> None:
    assert not imports_diffusers(source)
