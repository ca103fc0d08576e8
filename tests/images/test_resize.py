from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from floyd.images.resize import resize_short_side, short_side_size, square

SIZES = [(64, 64), (100, 64), (64, 100), (1000, 333), (333, 1000), (17, 23), (512, 768), (5, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [64, 256])
def test_sizes_and_pixels_equal_the_incumbent(size: tuple[int, int], side: int) -> None:
    resize = pytest.importorskip("diffusers.pipelines.deepfloyd_if.pipeline_if_img2img").resize
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    np.testing.assert_array_equal(np.asarray(resize_short_side(picture, side)), np.asarray(resize(picture, side)))


@pytest.mark.parametrize("size", SIZES)
def test_stage_two_gets_multiples_of_sixteen(size: tuple[int, int]) -> None:
    width, height = short_side_size(*size, 256, multiple=16)
    assert width % 16 == height % 16 == 0
    assert min(width, height) == 256
    assert (width >= height) == (size[0] >= size[1])


def test_a_side_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16, got 72"):
        short_side_size(10, 10, 72, multiple=16)


def test_a_square_is_cut_where_it_is_told_and_may_be_mirrored() -> None:
    picture = Image.new("RGB", (30, 10), "red")
    picture.paste((0, 0, 255), (20, 0, 30, 10))
    assert square(picture, 5).getpixel((2, 2)) == (255, 0, 0)
    assert square(picture, 5, place=1.0).getpixel((2, 2)) == (0, 0, 255)
    half = square(picture, 10, place=0.75)
    assert half.getpixel((0, 5)) == (255, 0, 0)
    assert half.getpixel((9, 5)) == (0, 0, 255)
    assert square(picture, 10, place=0.75, is_flipped=True).getpixel((0, 5)) == (0, 0, 255)
    with pytest.raises(ValueError, match=r"place must be in \[0, 1\], got 1.5"):
        square(picture, 5, place=1.5)
