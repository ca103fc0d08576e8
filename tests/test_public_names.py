"""What `import floyd` promises: these names, found when asked for, and a light start."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import floyd

HEAVY = ("torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors", "diffusers")


def run_python(code: str) -> str:
    """What a fresh interpreter prints: this one has imported everything already."""
    path = os.pathsep.join([str(Path(floyd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_the_public_names_are_sorted_and_named_once() -> None:
    assert floyd.__all__ == sorted(set(floyd.__all__))


@pytest.mark.parametrize("name", floyd.__all__)
def test_a_public_name_resolves(name: str) -> None:
    value = getattr(floyd, name)
    assert value is not None
    if name != "__version__":
        assert value.__name__ == name


def test_every_public_name_has_a_home() -> None:
    assert sorted([*floyd._HOMES, "__version__"]) == floyd.__all__


def test_editors_are_told_the_same_homes() -> None:
    tree = ast.parse(Path(floyd.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == floyd._HOMES


def test_importing_floyd_imports_nothing_heavy() -> None:
    loaded = run_python(f"import sys, floyd; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded == "[]"


def test_asking_for_the_version_or_the_names_imports_nothing_heavy() -> None:
    code = "import sys, floyd; floyd.__version__; dir(floyd); print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_the_names_are_listed_before_they_are_loaded() -> None:
    assert set(floyd.__all__) <= set(dir(floyd))


def test_an_unknown_name_is_an_attribute_error_that_says_it() -> None:
    with pytest.raises(AttributeError, match="'floyd' has no attribute 'IFPipelin'"):
        floyd.IFPipelin  # noqa: B018
    with pytest.raises(ImportError, match="IFPipelin"):
        exec("from floyd import IFPipelin")


def test_the_version_is_three_numbers() -> None:
    assert [part.isdigit() for part in floyd.__version__.split(".")] == [True] * 3


def test_the_package_ships_its_types() -> None:
    assert (Path(floyd.__file__).parent / "py.typed").is_file()
