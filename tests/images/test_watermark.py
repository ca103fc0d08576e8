from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from floyd.images.watermark import draw, watermark_box


@pytest.fixture
def watermark() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (62, 62, 4), dtype=np.uint8)


@pytest.mark.parametrize(
    ("side", "box"), [(64, (61, 61, 64, 64)), (256, (238, 238, 253, 253)), (1024, (948, 948, 1010, 1010))]
)
def test_the_box_scales_with_the_picture(side: int, box: tuple[int, ...]) -> None:
    assert watermark_box(side, side) == box


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (1024, 1024), (320, 256), (256, 440)])
def test_pixels_equal_the_incumbents(size: tuple[int, int], watermark: np.ndarray) -> None:
    theirs = pytest.importorskip("diffusers.pipelines.deepfloyd_if").IFWatermarker()
    theirs.watermark_image.copy_(torch.from_numpy(watermark))
    # The incumbent names the mode, which Pillow announces to drop; the picture is the same without.
    theirs.watermark_image_as_pil = Image.fromarray(watermark)
    picture = Image.new("RGB", size, (90, 140, 200))
    marked = draw(picture, watermark)
    (expected,) = theirs.apply_watermark([picture.copy()], sample_size=64)
    np.testing.assert_array_equal(np.asarray(marked), np.asarray(expected))
    assert marked.tobytes() != picture.tobytes()


@pytest.mark.parametrize(
    "size", [(32, 32), (17, 17), (64, 32), (40, 500), (16, 16), (8, 30), (1, 1), (2000, 3), (1, 4096), (4096, 4096)]
)
def test_a_picture_of_any_size_is_marked_inside(size: tuple[int, int], watermark: np.ndarray) -> None:
    left, upper, right, lower = watermark_box(*size)
    watermark[:] = 255
    picture = Image.new("RGB", size)
    changed_HW = np.any(np.asarray(draw(picture, watermark)) != 0, axis=-1)
    assert changed_HW[upper:lower, left:right].any()
    changed_HW[upper:lower, left:right] = False
    assert not changed_HW.any()


def test_the_box_lies_in_the_picture_and_is_a_square_whatever_the_size() -> None:
    for width in (*range(1, 40), 64, 100, 333, 1024, 4096):
        for height in (*range(1, 40), 64, 100, 333, 1024, 4096):
            left, upper, right, lower = watermark_box(width, height)
            assert 0 <= left < right <= width
            assert 0 <= upper < lower <= height
            assert right - left == lower - upper


def test_the_given_picture_stays_unmarked(watermark: np.ndarray) -> None:
    picture = Image.new("RGB", (64, 64))
    draw(picture, watermark)
    assert not np.asarray(picture).any()


def test_a_blank_watermark_leaves_no_trace() -> None:
    picture = Image.new("RGB", (64, 64), (5, 6, 7))
    assert draw(picture, np.zeros((62, 62, 4), dtype=np.uint8)).tobytes() == picture.tobytes()


@pytest.mark.parametrize("watermark", [np.zeros((62, 62, 4)), np.zeros((62, 62, 3), dtype=np.uint8)])
def test_a_watermark_of_another_kind_is_refused(watermark: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8, got"):
        draw(Image.new("RGB", (64, 64)), watermark)
