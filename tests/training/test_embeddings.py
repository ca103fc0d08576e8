from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from floyd.training import embeddings
from floyd.training.embeddings import Embeddings


class Encoder:
    def __init__(self) -> None:
        self.read: list[list[str]] = []

    def __call__(self, texts: list[str]) -> Tensor:
        self.read.append(list(texts))
        return torch.stack([torch.full((3, 2), float(len(text))) for text in texts])


def test_every_text_is_read_once_and_found_again(tmp_path: Path) -> None:
    encoder, cache = Encoder(), Embeddings(tmp_path, "one")
    assert list(cache.read(["a", "bb", "a", ""], encoder, at_once=2)) == [2, 1]
    assert encoder.read == [["a", "bb"], [""]]
    again = Embeddings(tmp_path, "one")
    assert again.missing(["bb", "ccc", "ccc", "a"]) == ["ccc"]
    assert list(again.read(["bb", "ccc"], encoder)) == [1]
    assert Embeddings(tmp_path, "one")(["ccc", "", "a"])[:, 0, 0].tolist() == [3.0, 0.0, 1.0]


def test_another_encoders_states_are_not_found(tmp_path: Path) -> None:
    list(Embeddings(tmp_path, "one").read(["a"], Encoder()))
    assert Embeddings(tmp_path, "another").missing(["a"]) == ["a"]


def test_what_was_read_before_a_kill_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "PER_FILE", 2)

    class Dying(Encoder):
        def __call__(self, texts: list[str]) -> Tensor:
            if len(self.read) == 1:
                raise KeyboardInterrupt
            return super().__call__(texts)

    with pytest.raises(KeyboardInterrupt):
        list(Embeddings(tmp_path, "one").read(["a", "b", "c", "d"], Dying()))
    assert Embeddings(tmp_path, "one").missing(["a", "b", "c", "d"]) == ["c", "d"]
