from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from floyd.images.modes import to_gray, to_rgb


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    wide = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    assert wide.mode == "I;16"
    np.testing.assert_array_equal(np.asarray(to_gray(wide)), [[0, 1, 128, 255]])
    np.testing.assert_array_equal(np.asarray(to_rgb(wide))[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_pictures_are_refused_where_the_scale_is_unknown(dtype: type) -> None:
    assert to_rgb(Image.fromarray(np.array([[0, 255]], dtype=dtype))).getpixel((1, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="scale it first"):
        to_rgb(Image.fromarray(np.array([[0, 256]], dtype=dtype)))
    with pytest.raises(ValueError, match="scale it first"):  # it would be black
        to_rgb(Image.fromarray(np.array([[0, 1]], dtype=dtype)))


def test_a_palette_with_transparency_is_read_without_a_warning() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.info["transparency"] = b"\x00\xff"
    assert to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)


def test_colours_below_transparent_pixels_appear() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)


def test_premultiplied_gray_is_read() -> None:
    assert to_rgb(Image.new("La", (1, 1))).mode == "RGB"
