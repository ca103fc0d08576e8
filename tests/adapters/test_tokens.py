from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from floyd.adapters.tokens import FILE_NAME, read_rows, write_rows
from floyd.errors import CheckpointError

ROW = torch.arange(4.0)


def test_what_was_written_is_read_from_the_file_or_its_folder(tmp_path: Path) -> None:
    path = write_rows({"zorp": ROW, "plik": -ROW}, tmp_path)
    assert path.name == FILE_NAME
    for place in (path, tmp_path):
        rows = read_rows(place)
        assert torch.equal(rows["zorp"], ROW)
        assert torch.equal(rows["plik"], -ROW)


def test_the_incumbents_shape_is_read_and_the_only_token_can_be_renamed(tmp_path: Path) -> None:
    save_file({"<cat-toy>": ROW[None]}, tmp_path / FILE_NAME)
    assert torch.equal(read_rows(tmp_path, token="zorp")["zorp"], ROW)
    assert list(read_rows({"x": ROW})) == ["x"]


def test_what_is_no_row_for_each_token_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the state dict must hold one row of numbers for each token; b"):
        read_rows({"a": ROW, "b": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="holds 2"):
        read_rows({"a": ROW, "b": ROW}, token="c")
