from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from floyd.images.metadata import read_info, save_png

PICTURE = Image.linear_gradient("L").convert("RGB")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    info = {"prompt": "a cat, “quoted” 猫 🐈", "seed": "0", "empty": "", "many lines": "a\nb\u00e9\n" * 1000}
    save_png(PICTURE, tmp_path / "a.png", info)
    assert read_info(tmp_path / "a.png") == info
    with Image.open(tmp_path / "a.png") as back:
        assert back.tobytes() == PICTURE.tobytes()


def test_a_picture_may_have_nothing_to_say(tmp_path: Path) -> None:
    save_png(PICTURE, str(tmp_path / "a.png"))
    assert read_info(tmp_path / "a.png") == {}


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    save_png(PICTURE, tmp_path / "a.png", {"seed": "1"})
    with pytest.raises(OSError, match="CMYK"):
        save_png(PICTURE.convert("CMYK"), tmp_path / "a.png", {"seed": "2"})
    assert read_info(tmp_path / "a.png") == {"seed": "1"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_a_file_is_replaced_not_overwritten(tmp_path: Path) -> None:
    save_png(PICTURE, tmp_path / "a.png", {"seed": "1"})
    with (tmp_path / "a.png").open("rb") as reader:
        save_png(PICTURE, tmp_path / "a.png", {"seed": "2"})
        assert b"seed\x001" in reader.read()
    assert read_info(tmp_path / "a.png") == {"seed": "2"}


def test_the_file_may_be_read_by_whoever_may_read_the_folders_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_png(PICTURE, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("info", [{"": "x"}, {"k" * 80: "x"}, {"ключ": "x"}, {"key": "a\0b"}])
def test_what_png_cannot_hold_is_refused(tmp_path: Path, info: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"got|NUL"):
        save_png(PICTURE, tmp_path / "a.png", info)
    assert not list(tmp_path.iterdir())


def test_numbers_must_be_written_out(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'seed'.*got int"):
        save_png(PICTURE, tmp_path / "a.png", {"seed": 1})  # type: ignore[dict-item]


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'a\.jpg'"):
        save_png(PICTURE, tmp_path / "a.jpg")
