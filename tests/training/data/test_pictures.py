from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from floyd.training.data.pictures import CROPS, POLICIES, Pictures, Window, indices_at, order, windows_for


def paint(path: Path, width: int = 12, height: int = 8, color: tuple[int, int, int] = (255, 0, 0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        paint(tmp_path / f"{i}.png").with_suffix(".txt").write_text(f"Picture <b>{i}</b> ")
    return tmp_path


def test_captions_are_cleaned_as_prompts_are(folder: Path) -> None:
    assert Pictures.of(folder).captions == ("picture 0", "picture 1", "picture 2")
    assert Pictures.of(folder, clean_caption=False).captions[0] == "picture <b>0</b>"


def test_a_caption_for_all_serves_those_that_have_none(folder: Path) -> None:
    (folder / "1.txt").unlink()
    assert Pictures.of(folder, caption="a zorp").captions == ("picture 0", "a zorp", "picture 2")


def test_everything_that_is_wrong_is_named_before_training_begins(folder: Path) -> None:
    (folder / "0.png").write_bytes(b"no picture")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "2.txt").unlink()
    with pytest.raises(ValueError, match=r"3 of 3 pictures cannot be used.*0\.png: it cannot be read") as error:
        Pictures.of(folder)
    assert "1.png: it cannot be read" in str(error.value)
    assert "2.png: it has no caption" in str(error.value)


def test_bad_pictures_are_left_out_if_so_wished_but_not_all(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "1.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        assert [item.name for item in Pictures.of(folder, on_bad="skip").items] == ["0.png", "2.png"]
    assert "Left out: 1.png" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 3 pictures cannot be used.*on_bad='skip'"):
        Pictures.of(folder)
    for i in (0, 2):
        (folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 3 pictures"):
        Pictures.of(folder, on_bad="skip")


def test_words_that_are_no_policy_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="on_bad must be one of error, skip, got 'ignore'"):
        Pictures.of(folder, on_bad="ignore")


def test_who_waits_hears_how_many_were_looked_at(folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    Pictures.of(folder, on_checked=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_a_picture_becomes_the_square_that_its_window_says(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, :4, 0] = 255  # red on the left, green in the middle, blue on the right
    pixels[:, 4:8, 1] = 255
    pixels[:, 8:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pictures = Pictures.of(tmp_path, caption="stripes")
    x_BCHW = pictures.batch([0, 0, 0], 4, [Window(0.0), Window(), Window(1.0)])
    assert x_BCHW.shape == (3, 3, 4, 4)
    assert [row.mean((1, 2)).argmax().item() for row in x_BCHW] == [0, 1, 2]
    assert (x_BCHW.amin().item(), x_BCHW.amax().item()) == (-1.0, 1.0)


def test_a_mirrored_window_is_the_picture_mirrored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    pictures = Pictures.of(tmp_path, caption="noise")
    plain, mirrored = pictures.batch([0, 0], 8, [Window(), Window(is_flipped=True)])
    assert torch.equal(plain.flip(-1), mirrored)
    assert not torch.equal(plain, mirrored)


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own() -> None:
    seen = [index for step in range(5) for index in indices_at(step, 4, 10, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert seen[:10] == order(10, 3, 0).tolist()
    assert seen != [index for step in range(5) for index in indices_at(step, 4, 10, seed=4)]


def test_a_step_decides_its_pictures_whatever_was_before() -> None:
    assert indices_at(7, 4, 10, seed=1) == indices_at(7, 4, 10, seed=1)
    assert len(indices_at(0, 25, 10, seed=1)) == 25


def test_a_wish_for_flips_changes_no_other_draw() -> None:
    def drawn(crop: str, flip: bool) -> tuple[list[Window], float]:
        generator = torch.Generator().manual_seed(0)
        return windows_for(32, crop, flip, generator), float(torch.rand(1, generator=generator))

    (plain, after), (wished, also) = drawn("center", False), drawn("random", True)
    assert after == also
    assert {window.place for window in plain} == {0.5}
    assert not any(window.is_flipped for window in plain)
    assert len({window.place for window in wished}) == 32
    assert 8 < sum(window.is_flipped for window in wished) < 24


def test_the_words_of_the_command_are_those_of_the_data() -> None:
    from floyd.apps.tuning import config

    assert (config.POLICIES, config.CROPS) == (POLICIES, CROPS)
