"""The house rule: a room imports only what stands below it, and some things have one home.

      apps
pipelines   training   scenes
adapters   engines
models   schedulers
nn   diffusion   text   images   runtime   store
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TypeGuard

import pytest

SRC = Path(__file__).parents[1] / "src" / "floyd"
FILES = sorted(SRC.rglob("*.py"))

GROUND = {"nn", "diffusion", "text", "images", "runtime", "store"}
BELOW_THE_ASSEMBLY = GROUND | {"models", "schedulers", "adapters", "engines"}
EVERYTHING = BELOW_THE_ASSEMBLY | {"pipelines", "training", "scenes", "utils"}

# Beside itself and `errors`. A room that is not listed here is refused: give it a floor first.
MAY_IMPORT: dict[str, set[str]] = {
    **{room: set() for room in GROUND},
    "models": {"nn", "store"},
    "schedulers": {"diffusion", "store"},
    "adapters": {"models", "store"},
    "engines": {"models", "nn", "runtime", "store"},
    "pipelines": BELOW_THE_ASSEMBLY,
    "training": BELOW_THE_ASSEMBLY,
    "scenes": {"images"},
    "apps": EVERYTHING,
    # files that stand in no room
    "errors": set(),
    "utils": {"images"},
    "__init__": EVERYTHING,
}

# A library -> the rooms that may use it. An import for type checkers alone is free.
HOMES: dict[str, set[str]] = {
    "PIL": {"images"},
    "huggingface_hub": {"store"},
    "safetensors": {"store"},
    "typer": {"apps"},
    "rich": {"apps"},
}
MAY_PRINT = {"apps"}


def room_of(path: Path) -> str:
    first = path.relative_to(SRC).parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, at its head or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            climb = "." * node.level
            yield from ((node.lineno, f"{climb}{node.module or ''}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The tree as it runs: without what stands under `if TYPE_CHECKING:`."""

    class Prune(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            return node.orelse if ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"} else node

    return ast.fix_missing_locations(Prune().visit(tree))


def floor_violations(source: str, room: str) -> list[str]:
    """What a file of this room may not import from floyd."""
    if room not in MAY_IMPORT:
        return [f"the room {room!r} has no floor in MAY_IMPORT"]
    allowed = MAY_IMPORT[room] | {"errors", room}
    wrong = []
    for line, name in imported(ast.parse(source)):
        parts = name.split(".")
        if name.startswith("."):
            wrong.append(f"line {line}: relative import {name}; name the room")
        elif parts == ["floyd"] and room != "apps":
            wrong.append(f"line {line}: import floyd; name the room")
        elif parts[0] == "floyd" and len(parts) > 1 and not (parts[1] in allowed or _is_public(parts, room)):
            wrong.append(f"line {line}: {room} may not import {name}")
    return wrong


def _is_public(parts: list[str], room: str) -> bool:
    """`from floyd import IFPipeline`, which is for apps; the version is for all."""
    return parts == ["floyd", "__version__"] or (room == "apps" and len(parts) == 2 and parts[1][0].isupper())


def wall_violations(source: str, room: str) -> list[str]:
    """Libraries away from their home, and words on the console."""
    tree = without_type_checking(ast.parse(source))
    wrong = [
        f"line {line}: {name} belongs to {sorted(HOMES[library])}"
        for line, name in imported(tree)
        if (library := name.split(".")[0]) in HOMES and room not in HOMES[library]
    ]
    if room not in MAY_PRINT:
        wrong += [f"line {node.lineno}: print" for node in ast.walk(tree) if _is_print(node)]
    return wrong


def _is_print(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def test_there_is_a_house_to_look_at() -> None:
    assert {room_of(path) for path in FILES} >= {"errors", "__init__", *GROUND}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_a_file_imports_only_what_stands_below_it(path: Path) -> None:
    assert floor_violations(path.read_text(encoding="utf-8"), room_of(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_a_file_uses_only_what_its_room_may(path: Path) -> None:
    assert wall_violations(path.read_text(encoding="utf-8"), room_of(path)) == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_room_is_told_of(page: str) -> None:
    text = (SRC.parents[1] / page).read_text(encoding="utf-8")
    rooms = {path.name for path in SRC.iterdir() if path.is_dir() and path.name != "__pycache__"}
    told = {
        name for line in text.splitlines() if line.startswith("| `") for name in line.split("|")[1].split("`")[1::2]
    }
    assert rooms <= told, f"{page} does not tell of {sorted(rooms - told)}"


def test_every_room_with_code_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} == set(MAY_IMPORT)


def test_no_room_stands_below_itself() -> None:
    assert list(TopologicalSorter(MAY_IMPORT).static_order())  # a cycle raises


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("diffusion", "from floyd.models.unet import UNet2DConditionModel"),
        ("diffusion", "import floyd.models.unet"),
        ("diffusion", "from floyd import models"),
        ("diffusion", "from floyd import UNet2DConditionModel"),
        ("diffusion", "import floyd"),
        ("diffusion", "from ..models import unet"),
        ("diffusion", "from . import schedule"),
        ("text", "def late():\n    from floyd.images.convert import pt_to_pil"),
        ("text", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from floyd.store.config import Config"),
        ("store", "from floyd.models.unet import UNet2DConditionModel"),
        ("models", "from floyd.diffusion.noise import Noise"),
        ("schedulers", "from floyd.models.unet import UNet2DConditionModel"),
        ("pipelines", "from floyd.training.loop import train"),
        ("training", "from floyd.pipelines.cascade import Cascade"),
        ("training", "from floyd.scenes.render import render"),
        ("scenes", "from floyd.diffusion.noise import Noise"),
        ("adapters", "from floyd.pipelines.base import DiffusionPipeline"),
        ("utils", "from floyd.pipelines.base import DiffusionPipeline"),
        ("attic", "import torch"),
    ],
)
def test_a_planted_climb_is_found(room: str, source: str) -> None:
    assert len(floor_violations(source, room)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("text", "from floyd.errors import FloydError\nfrom floyd.text.checks import check_prompts\nimport torch"),
        ("store", "from floyd import __version__"),
        ("models", "from floyd.nn.attention import AddedKVAttention\nfrom floyd.store.config import Config"),
        ("pipelines", "from floyd.adapters.lora import attach\nfrom floyd.text.prompts import encode_prompt"),
        ("apps", "import floyd\nfrom floyd import IFPipeline\nfrom floyd.training.loop import train"),
    ],
)
def test_a_lawful_import_passes(room: str, source: str) -> None:
    assert floor_violations(source, room) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("pipelines", "from PIL import Image"),
        ("scenes", "def late():\n    import PIL.Image"),
        ("models", "from safetensors.torch import load_file"),
        ("pipelines", "import huggingface_hub"),
        ("pipelines", "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import PIL"),
        ("training", "def step(loss):\n    print(loss)"),
        ("store", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich\nelse:\n    import rich"),
    ],
)
def test_a_planted_breach_of_a_wall_is_found(room: str, source: str) -> None:
    assert len(wall_violations(source, room)) == 1


def test_a_type_alone_breaches_no_wall() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from PIL.Image import Image"
    assert wall_violations(source, "pipelines") == []
    assert wall_violations("print('done')\nfrom rich import console", "apps") == []
