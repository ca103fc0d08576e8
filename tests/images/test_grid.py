from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from floyd.images.grid import make_image_grid

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200)]


def test_pictures_lie_row_by_row_as_in_the_incumbent() -> None:
    theirs = pytest.importorskip("diffusers.utils").make_image_grid
    images = [Image.new("RGB", (4, 3), colour) for colour in COLOURS]
    for resize in (None, 5):
        got, expected = make_image_grid(images, rows=2, cols=3, resize=resize), theirs(images, 2, 3, resize)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    assert make_image_grid(images, rows=2, cols=3).getpixel((5, 4)) == COLOURS[4]


def test_the_largest_picture_sets_the_cell() -> None:
    images = [Image.new("RGB", (2, 2), COLOURS[0]), Image.new("RGB", (6, 5), COLOURS[1])]
    sheet = make_image_grid(images, rows=1, cols=2)
    assert sheet.size == (12, 5)
    assert sheet.getpixel((11, 4)) == COLOURS[1]
    assert sheet.getpixel((5, 4)) == (0, 0, 0)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 2), (3, 0)])
def test_a_number_that_does_not_fit_is_refused(rows: int, cols: int) -> None:
    with pytest.raises(ValueError, match=f"needs {rows * cols} images, got 3"):
        make_image_grid([Image.new("RGB", (2, 2))] * 3, rows=rows, cols=cols)


def test_no_picture_is_no_grid() -> None:
    with pytest.raises(ValueError, match="got 0"):
        make_image_grid([], rows=0, cols=0)
