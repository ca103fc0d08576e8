from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from floyd.apps.tuning.looking import Board, at_rest, cleaned, save_pictures


def test_a_board_holds_every_loss_and_picture_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path)
    board.losses(3, {"noise": 0.5, "variance": 0.25})
    board.losses(4, {"noise": 0.125})
    board.pictures(4, [Image.new("RGB", (4, 4), "red")])
    board.close()
    told = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in told.Scalars("loss/noise")] == [(3, 0.5), (4, 0.125)]
    assert [event.step for event in told.Images("validation/0")] == [4]


def test_a_board_asks_the_writer_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            asked.append(("open", folder))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            asked.append((name, value, step))

        def add_image(self, name: str, picture: Any, step: int, *, dataformats: str) -> None:
            asked.append((name, picture.shape, step, dataformats))

        def close(self) -> None:
            asked.append(("close",))

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = Board(tmp_path)
    board.losses(3, {"noise": 0.5})
    board.pictures(3, [Image.new("RGB", (4, 6))])
    board.close()
    assert asked == [
        ("open", str(tmp_path)),
        ("loss/noise", 0.5, 3),
        ("validation/0", (6, 4, 3), 3, "HWC"),
        ("close",),
    ]


def test_a_model_at_rest_goes_back_to_what_it_was() -> None:
    model = nn.Dropout(0.9).train()
    with at_rest(model):
        assert torch.equal(model(torch.ones(9)), torch.ones(9))
    assert model.training


def test_validation_prompts_are_read_as_captions_are() -> None:
    assert cleaned(["A <b>Cat</b>"], clean_caption=True) == ("a cat",)


def test_pictures_are_named_by_their_step(tmp_path: Path) -> None:
    paths = save_pictures([Image.new("RGB", (2, 2))] * 2, tmp_path / "deep", 25)
    assert [path.name for path in paths] == ["step-000025-0.png", "step-000025-1.png"]
    assert all(path.is_file() for path in paths)
