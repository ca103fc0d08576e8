from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import floyd
from floyd.apps.cli.app import app
from floyd.apps.cli.generate import Files
from floyd.images.metadata import read_info
from floyd.pipelines.cascade import Cascade
from floyd.store.fingerprint import fingerprint

PROMPT = "a red circle above a blue square, ünïcödé 猫"


@pytest.fixture
def generate(
    folder: Path, cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Result]]:
    """`floyd generate PROMPT -o tmp_path/picture.png`, with a cascade that is loaded already."""
    monkeypatch.setattr(Cascade, "from_pretrained", lambda *models, **options: cascade)

    def run(*arguments: str, prompt: str = PROMPT, output: str = "picture.png", model: str = str(folder)) -> Result:
        return CliRunner().invoke(app, ["generate", prompt, "-o", str(tmp_path / output), "--model", model, *arguments])

    yield run
    cascade.use_engine(None)  # which all tests share


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------------- results


def test_only_the_stages_that_the_size_needs_are_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Cascade] = []
    whole = Cascade.from_pretrained

    def noted(*models: str, **options: Any) -> Cascade:
        loaded.append(whole(*models, **options))
        return loaded[-1]

    monkeypatch.setattr(Cascade, "from_pretrained", noted)
    path = tmp_path / "picture.png"
    result = CliRunner().invoke(app, ["generate", PROMPT, "-o", str(path), "--model", str(folder), "--size", "48"])
    assert result.exit_code == 0, result.stderr
    assert [list(cascade.stages) for cascade in loaded] == [["stage_1"]]
    assert pixels(path).shape == (48, 48, 3)


def test_the_picture_is_the_cascades(generate: Callable[..., Result], cascade: Cascade, tmp_path: Path) -> None:
    result = generate("--seed", "4", "--size", "96")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'picture.png'}\n"
    expected = cascade(PROMPT, seed=4, size=96).images[0]
    assert np.array_equal(pixels(tmp_path / "picture.png"), np.asarray(expected))


def test_the_file_says_what_made_it(
    generate: Callable[..., Result], folder: Path, tmp_path: Path, compiled: object
) -> None:
    generate("--seed", "4", "--size", "96", "--guidance", "3,1.5", "--negative-prompt", "a dog")
    assert read_info(tmp_path / "picture.png") == {
        "prompt": PROMPT,
        "negative_prompt": "a dog",
        "seed": "4",
        "size": "96",
        "steps": "3,2",
        "guidance": "3,1.5",
        "model": str(folder),
        "model_hash": fingerprint(folder),
        "engine": "winograd",
        "dtype": "float32",
        "device": "cpu",
        "Software": f"floyd {floyd.__version__}",
    }


def test_a_size_of_two_numbers_is_that_of_the_last_picture(generate: Callable[..., Result], tmp_path: Path) -> None:
    """And what made it makes it again."""
    result = generate("--size", "101x75", "--stages-dir", str(tmp_path / "stages"))
    assert result.exit_code == 0, result.stderr
    assert pixels(tmp_path / "picture.png").shape == (75, 101, 3)
    assert pixels(tmp_path / "stages" / "picture-50x38.png").shape == (38, 50, 3)
    assert read_info(tmp_path / "picture.png")["size"] == "101x75"
    assert "50x38 px: " in result.stderr
    generate("--size", "101x75", output="again.png")
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "picture.png"))


def test_what_made_a_picture_makes_it_again(generate: Callable[..., Result], tmp_path: Path) -> None:
    """The kept pictures of the stages, too."""
    generate("--seed", "9", "--steps", "smart27,2", "--size", "96", "--stages-dir", str(tmp_path / "stages"))
    for path in (tmp_path / "picture.png", tmp_path / "stages" / "picture-48.png"):
        info = read_info(path)
        asked = [f"--{key}={info[key]}" for key in ("seed", "size", "steps", "guidance")]
        assert generate(*asked, prompt=info["prompt"], output="again.png").exit_code == 0
        assert np.array_equal(pixels(path), pixels(tmp_path / "again.png"))
        assert read_info(tmp_path / "again.png") == info
    assert names(tmp_path) == ["again.png", "picture.png", "stages/picture-48.png"]


def test_colours_are_kept_if_told_and_the_file_says_so(generate: Callable[..., Result], tmp_path: Path) -> None:
    given = ("--seed", "9", "--size", "96", "--steps", "2")
    drawn = {}
    for flag in ((), ("--color-fix",), ("--no-color-fix",)):
        assert generate(*given, *flag).exit_code == 0
        drawn[flag] = (pixels(tmp_path / "picture.png"), read_info(tmp_path / "picture.png").get("color_fix"))
    (plain, said), (fixed, on), (unfixed, off) = drawn.values()
    assert (said, on, off) == (None, "on", "off")
    assert np.array_equal(plain, unfixed)
    assert not np.array_equal(plain, fixed)


def test_a_guidance_interval_is_kept_in_the_file_and_makes_the_picture_again(
    generate: Callable[..., Result], tmp_path: Path
) -> None:
    given = ("--seed", "9", "--size", "48", "--guidance", "3", "--steps", "4")
    assert generate(*given, "--guidance-interval", "300-700").exit_code == 0
    info = read_info(tmp_path / "picture.png")
    assert info["guidance_interval"] == "300-700"
    again = [f"--{key.replace('_', '-')}={info[key]}" for key in ("seed", "size", "steps", "guidance")]
    again.append(f"--guidance-interval={info['guidance_interval']}")
    assert generate(*again, prompt=info["prompt"], output="again.png").exit_code == 0
    assert np.array_equal(pixels(tmp_path / "picture.png"), pixels(tmp_path / "again.png"))
    generate(*given, output="other.png")
    assert not np.array_equal(pixels(tmp_path / "picture.png"), pixels(tmp_path / "other.png"))
    generate(*given, "--guidance-interval", "0-1000", output="whole.png")
    assert read_info(tmp_path / "whole.png") == read_info(tmp_path / "other.png")


def test_a_quality_is_kept_in_the_file_and_makes_the_picture_again(
    generate: Callable[..., Result], tmp_path: Path
) -> None:
    assert generate("--quality", "draft", "--size", "96").exit_code == 0
    info = read_info(tmp_path / "picture.png")
    assert info["quality"] == "draft"
    again = [f"--{key}={info[key]}" for key in ("seed", "size", "quality", "steps", "guidance")]
    assert generate(*again, prompt=info["prompt"], output="again.png").exit_code == 0
    assert np.array_equal(pixels(tmp_path / "picture.png"), pixels(tmp_path / "again.png"))
    generate("--size", "96", output="other.png")
    assert not np.array_equal(pixels(tmp_path / "picture.png"), pixels(tmp_path / "other.png"))


def test_an_engine_paints_the_same_picture_and_fewer_bits_another(
    folder: Path, tmp_path: Path, compiled: object
) -> None:
    """Nothing is replaced here. The file names them."""

    def drawn(name: str, *arguments: str) -> np.ndarray:
        place = [] if "--ram" in arguments else ["--device", "cpu"]
        told = ["-o", str(tmp_path / name), "--model", str(folder), *place, "--size", "96", *arguments]
        result = CliRunner().invoke(app, ["generate", PROMPT, *told])
        assert result.exit_code == 0, result.stderr
        return pixels(tmp_path / name).astype(int)

    plain = drawn("plain.png", "--engine", "torch")
    assert np.abs(drawn("engine.png", "--engine", "winograd") - plain).max() <= 1
    assert np.abs(drawn("coarse.png", "--quantization", "int4") - plain).max() > 1
    assert np.array_equal(drawn("auto.png"), drawn("engine.png", "--engine", "winograd"))
    assert np.array_equal(drawn("planned.png", "--ram", "2GB"), drawn("torch.png", "--ram", "2GB", "--engine", "torch"))
    assert "engine" not in read_info(tmp_path / "plain.png") | read_info(tmp_path / "planned.png")
    assert read_info(tmp_path / "engine.png")["engine"] == read_info(tmp_path / "auto.png")["engine"] == "winograd"
    assert "engine" not in read_info(tmp_path / "coarse.png")
    assert read_info(tmp_path / "coarse.png")["quantization"] == "int4"


def test_all_stages_before_the_last_are_kept(generate: Callable[..., Result], cascade: Cascade, tmp_path: Path) -> None:
    assert generate("--stages-dir", str(tmp_path)).exit_code == 0
    assert names(tmp_path) == ["picture-48.png", "picture-96.png", "picture.png"]
    sides = [pixels(tmp_path / name).shape[0] for name in names(tmp_path)]
    assert sides == [48, 96, 384]
    assert read_info(tmp_path / "picture-96.png")["steps"] == "3,2"
    assert read_info(tmp_path / "picture.png")["steps"] == "3,2,2"
    assert read_info(tmp_path / "picture.png")["guidance"] == "2,1,1"


def test_picture_i_of_several_is_the_picture_of_its_own_seed(generate: Callable[..., Result], tmp_path: Path) -> None:
    result = generate("--count", "3", "--seed", "5", "--size", "48", output="many.png")
    assert result.stdout.splitlines() == [str(tmp_path / f"many-{i}.png") for i in range(3)]
    for i in range(3):
        generate("--seed", str(5 + i), "--size", "48", output="one.png")
        assert np.array_equal(pixels(tmp_path / f"many-{i}.png"), pixels(tmp_path / "one.png"))
        assert read_info(tmp_path / f"many-{i}.png") == read_info(tmp_path / "one.png")


def test_a_batch_paints_the_same_pictures_at_once(generate: Callable[..., Result], tmp_path: Path) -> None:
    generate("--count", "3", "--size", "48", output="one.png")
    generate("--count", "3", "--size", "48", "--batch", "2", output="two.png")
    for i in range(3):
        one, two = (pixels(tmp_path / f"{name}-{i}.png").astype(int) for name in ("one", "two"))
        assert np.abs(one - two).mean() < 0.1
        assert read_info(tmp_path / f"two-{i}.png")["seed"] == str(i)
    assert not np.array_equal(pixels(tmp_path / "one-0.png"), pixels(tmp_path / "one-1.png"))


def test_a_profile_is_told_beside_the_picture(generate: Callable[..., Result], tmp_path: Path) -> None:
    generate("--seed", "4", output="alone.png")
    for quiet in ((), ("--quiet",)):
        result = generate("--seed", "4", "--profile", *quiet)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == ("" if quiet else f"{tmp_path / 'picture.png'}\n")
        assert np.array_equal(pixels(tmp_path / "picture.png"), pixels(tmp_path / "alone.png"))
        rows = [line.split()[0] for line in result.stderr.splitlines() if line and line[0] in "soaf"]
        assert rows == ["stage_1", "stage_2", "stage_3", "outside", "all", "floor:"]
        assert re.search(r"^stage_1 +3 steps ", result.stderr, re.MULTILINE)
        assert re.search(r"^  VAE +1 ", result.stderr, re.MULTILINE)


def test_without_a_picture_there_is_no_profile(
    generate: Callable[..., Result], cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise MemoryError("none left")
        yield

    monkeypatch.setattr(cascade, "run", fail)
    result = generate("--profile")
    assert result.exit_code != 0
    assert "outside" not in result.stderr


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match="may not be written to"):
        Files.checked(tmp_path / "picture.png", 1, None)


def test_names_of_many_pictures_sort_as_numbers_do() -> None:
    files = Files(Path("a.b.png"), 11, None)
    assert [files.path(i).name for i in (0, 9, 10)] == ["a.b-00.png", "a.b-09.png", "a.b-10.png"]
    assert Files(Path("a.png"), 1, None).path(0) == Path("a.png")


def test_progress_is_told_on_stderr_and_not_if_quiet(generate: Callable[..., Result]) -> None:
    told = generate("--size", "96").stderr.splitlines()
    assert [line.split(",")[0] for line in told] == ["48 px: 3/3", "96 px: 2/2"]
    quiet = generate("--size", "48", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_model_is_loaded_as_asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is replaced here; two pipelines' folders make a cascade of two stages."""
    monkeypatch.chdir(tmp_path)
    models = [f"--model={folder / stage}" for stage in ("stage_1", "stage_2")]
    result = CliRunner().invoke(
        app, ["generate", "a cat", *models, "--dtype", "bfloat16", "--device", "cpu", "--steps", "1", "--size", "48"]
    )
    assert result.exit_code == 0, result.stderr
    info = read_info(tmp_path / "picture.png")
    assert info["dtype"] == "bfloat16"
    assert info["model"] == f"{folder / 'stage_1'}, {folder / 'stage_2'}"
    assert info["model_hash"] == f"{fingerprint(folder / 'stage_1')}, {fingerprint(folder / 'stage_2')}"


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("output", "arguments", "message"),
    [
        ("picture.jpg", [], "must end in .png"),
        ("picture", [], "must end in .png"),
        ("nowhere/picture.png", [], "There is no folder"),
        ("folder.png", [], "is a folder"),
        ("picture.png", ["--stages-dir", "{tmp}/nowhere/stages"], "There is no folder"),
        ("picture.png", ["--stages-dir", "{tmp}/file.txt"], "is a file"),
        ("picture.png", ["--size", "100"], "size must be one of 48, 96, 384"),
        ("picture.png", ["--size", "big"], "--size"),
        ("picture.png", ["--size", "96x"], "width and height as in 384x256; got '96x'"),
        ("picture.png", ["--size", "0x64"], "The width of size must be a number of pixels"),
        ("picture.png", ["--size", "402x255"], "400x256 would do"),
        ("picture.png", ["--steps", "0"], "num_inference_steps must be a positive int, got 0"),
        ("picture.png", ["--steps", "2000"], "got 2000"),
        ("picture.png", ["--steps", "fast28"], "fast28"),
        ("picture.png", ["--steps", "2,"], "steps must be"),
        ("picture.png", ["--steps", "2,2"], "or 3, for stage_1"),
        ("picture.png", ["--guidance", "nan"], "guidance_scale must be a finite number"),
        ("picture.png", ["--guidance-interval", "700-300"], "0 <= low < high"),
        ("picture.png", ["--guidance-interval", "300"], "two timesteps as in 200-800"),
        ("picture.png", ["--guidance", "strong"], "guidance must be a number"),
        ("picture.png", ["--quality", "best"], "quality must be one of draft, standard, quality, got 'best'"),
        ("picture.png", ["--seed", "-1"], "--seed"),
        ("picture.png", ["--count", "0"], "--count"),
        ("picture.png", ["--negative-prompt", "\udcff"], "not valid UTF-8"),
    ],
)
def test_bad_arguments_are_one_line_and_no_work(
    generate: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    arguments: list[str],
    message: str,
) -> None:
    def paint(*args: Any) -> None:
        raise AssertionError("painted")

    monkeypatch.setattr("floyd.apps.cli.generate.painted", paint)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").touch()
    result = generate(*(argument.format(tmp=tmp_path) for argument in arguments), output=output)
    assert result.exit_code == 2, result.exception
    assert message in result.stderr
    assert result.stderr.startswith("floyd: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("prompt", ["", " \t"])
def test_an_empty_prompt_is_refused(generate: Callable[..., Result], tmp_path: Path, prompt: str) -> None:
    result = generate(prompt=prompt)
    assert (result.exit_code, result.stderr) == (2, "floyd: The prompt is empty: say what the picture shows.\n")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{tmp}"], "none of them"),
        (["--model", "{tmp}/nowhere"], "neither an existing folder nor a hub id"),
        (["--model", "{folder}", "--dtype", "float33"], "float33"),
        (["--model", "{folder}", "--device", "toaster"], "toaster"),
        (["--model", "{folder}", "--device", "cuda:99"], "cannot compute on 'cuda:99'"),
        (["--model", "{folder}", "--threads", "0"], "--threads"),
        (
            ["--model", "{folder}", "--engine", "turbo"],
            "must be one of auto, torch, winograd, openvino, got 'turbo'",
        ),
        (["--model", "{folder}", "--engine", "winograd", "--dtype", "bfloat16"], "float32"),
        (["--model", "{folder}", "--quantization", "int3"], "int3"),
        (["--model", "a", "--model", "b", "--model", "c", "--model", "d"], "got 4"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    asked = [argument.format(tmp=tmp_path, folder=folder) for argument in arguments]
    result = CliRunner().invoke(app, ["generate", "a cat", "-o", str(tmp_path / "a.png"), *asked])
    assert result.exit_code == 2, result.exception
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------------------------------- interruption

_UNTIL_INTERRUPTED = """
import time
from floyd.apps.cli import main
from floyd.apps.cli.progress import _Lines

def step(self, count=1, note=""):
    print("painting", flush=True)
    time.sleep(0.05)

_Lines.step = step
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_leaves_no_file_and_exits_130(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"an older one")
    arguments = ["generate", "a cat", "--model", str(folder), "--steps", "500", "-o", str(tmp_path / "picture.png")]
    path = os.pathsep.join([str(Path(floyd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", _UNTIL_INTERRUPTED, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (first, told) == ("painting\n", "floyd: interrupted; 0 of 1 pictures were finished.\n")
    assert process.returncode == 130
    assert names(tmp_path) == ["picture.png"]
    assert (tmp_path / "picture.png").read_bytes() == b"an older one"


def test_ctrl_c_amid_writing_leaves_no_half_file(
    generate: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Image.Image.save
    num_saved = 0

    def save(picture: Image.Image, file: Any, **options: Any) -> None:
        nonlocal num_saved
        num_saved += 1
        if num_saved == 2:
            file.write(b"\x89PNG half of it")
            signal.raise_signal(signal.SIGINT)
        whole(picture, file, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    result = generate("--count", "3", "--size", "48", "--quiet")
    assert result.exit_code == 130
    assert result.stderr == "floyd: interrupted; 1 of 3 pictures were finished.\n"
    assert names(tmp_path) == ["picture-0.png"]
    assert pixels(tmp_path / "picture-0.png").shape == (48, 48, 3)
