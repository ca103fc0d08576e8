"""What `pip install` brings: all of the package, and a command that draws from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="the build backend; `pip install hatchling`")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "floyd"
MUST_TRAVEL = (
    "floyd/py.typed",
    "floyd/mini/floyd.json",
    "floyd/mini/README.md",
    "floyd/mini/stage_1/unet/diffusion_pytorch_model.safetensors",
    "floyd/mini/stage_1/tokenizer/spiece.model",
    "floyd/mini/stage_3/vae/diffusion_pytorch_model.safetensors",
    "floyd/engines/kernels/engine.cpp",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", os.fspath(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (built,) = folder.glob("floyd_if-*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    travelled = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("floyd_if-")}
    assert travelled == {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    assert travelled.issuperset(MUST_TRAVEL)


def test_the_wheel_says_what_it_needs_and_how_it_is_called(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if name.startswith("floyd_if-")}
        metadata = archive.read(f"{folder}/METADATA").decode()
        commands = archive.read(f"{folder}/entry_points.txt").decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert "Requires-Dist: torch>=2.10" in needed
    assert not any("diffusers" in line for line in needed)
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "floyd = floyd.apps.cli:main" in commands


@pytest.mark.slow
def test_what_is_installed_draws_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", os.fspath(site)]
    subprocess.run([sys.executable, *install, os.fspath(wheel)], check=True, timeout=300)
    told = {**os.environ, "PYTHONPATH": os.fspath(site), "HF_HUB_OFFLINE": "1"}
    where = [sys.executable, "-c", "import floyd; print(floyd.__file__)"]
    place = subprocess.run(where, env=told, cwd=elsewhere, check=True, capture_output=True, text=True).stdout
    assert Path(place.strip()).is_relative_to(site)
    draw = [sys.executable, "-m", "floyd.apps.cli", "generate", "a red circle", "--size", "64", "--steps", "2", "-q"]
    subprocess.run(draw, env=told, cwd=elsewhere, check=True, timeout=300)
    assert (elsewhere / "picture.png").stat().st_size > 500
