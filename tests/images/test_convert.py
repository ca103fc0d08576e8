from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from floyd.images.convert import UNIT, numpy_to_pil, pt_to_numpy, pt_to_pil, to_output, to_tensor, to_unit
from floyd.images.mask import mask_to_tensor
from floyd.images.resize import resize_short_side


def picture(width: int = 10, height: int = 6, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_that_pillow_has_becomes_three_channels(mode: str) -> None:
    x_BCHW = to_tensor(Image.new(mode, (4, 3)))
    assert x_BCHW.shape == (1, 3, 3, 4)
    assert mask_to_tensor(Image.new(mode, (4, 3))).shape == (1, 1, 3, 4)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    x_BCHW = to_tensor(picture(mode=mode))
    assert x_BCHW.shape == (1, 3, 6, 10)
    assert x_BCHW.dtype == torch.float32
    assert x_BCHW.abs().max() <= 1


def test_a_camera_held_upright_gives_an_upright_picture() -> None:
    lying = picture()
    lying.getexif()[0x0112] = 6  # turn by 90 degrees
    x_BCHW = to_tensor(lying)
    assert torch.equal(x_BCHW, to_tensor(picture().transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("size", [(10, 6), (6, 10), (33, 20)])
def test_a_picture_enters_as_in_the_incumbent(size: tuple[int, int]) -> None:
    module = pytest.importorskip("diffusers.pipelines.deepfloyd_if.pipeline_if_img2img")
    model = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(sample_size=16)))
    pictures = [picture(*size), picture(*size, mode="RGBA")]
    expected_BCHW = module.IFImg2ImgPipeline.preprocess_image(model, pictures)
    assert torch.equal(to_tensor(pictures, resize=lambda given: resize_short_side(given, 16)), expected_BCHW)


def test_the_same_pixels_give_the_same_tensor_however_they_come() -> None:
    pixels_HWC = np.asarray(picture())
    expected_BCHW = to_tensor(picture())
    signed_HWC = pixels_HWC / 127.5 - 1
    ways: list[Any] = [
        pixels_HWC,
        pixels_HWC[None],
        [pixels_HWC],
        torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1),
        signed_HWC,
        signed_HWC.astype(np.float32)[None],
        [torch.from_numpy(signed_HWC).permute(2, 0, 1)[None]],
    ]
    for way in ways:
        torch.testing.assert_close(to_tensor(way), expected_BCHW)


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", ">f8", np.longdouble])
def test_floats_of_any_width_and_byte_order_are_read(dtype: Any) -> None:
    signed_HWC = np.asarray(picture()) / 127.5 - 1
    turned_HWC = signed_HWC[::-1, ::-1].astype(dtype)[::-1, ::-1]  # strides that torch does not know
    torch.testing.assert_close(to_tensor(turned_HWC), to_tensor(picture()), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_floats_of_any_width_are_read(dtype: torch.dtype) -> None:
    torch.testing.assert_close(to_tensor(to_tensor(picture()).to(dtype)), to_tensor(picture()), atol=5e-3, rtol=0)


def test_a_range_is_stretched_only_on_request() -> None:
    half_CHW = torch.full((3, 2, 2), 0.5)
    assert torch.equal(to_tensor(half_CHW), half_CHW[None])
    assert torch.equal(to_tensor(half_CHW, value_range=UNIT), torch.zeros(1, 3, 2, 2))


def test_bright_tensors_are_not_taken_for_another_range() -> None:
    bright_BCHW = torch.rand(1, 3, 4, 4) * 0.9 + 0.1
    assert torch.equal(to_tensor(bright_BCHW), bright_BCHW)


def test_gray_arrays_become_rgb() -> None:
    gray_HW1 = np.asarray(picture(mode="L"))[..., None]
    assert torch.equal(to_tensor(gray_HW1), to_tensor(picture(mode="L")))


def test_a_list_becomes_one_batch_in_its_order() -> None:
    x_BCHW = to_tensor([torch.zeros(2, 3, 4, 4), torch.ones(3, 4, 4)])
    assert x_BCHW[:, 0, 0, 0].tolist() == [0, 0, 1]


def test_the_given_tensor_is_not_shared() -> None:
    given_BCHW = torch.zeros(1, 3, 2, 2)
    to_tensor(given_BCHW).add_(1)
    assert not given_BCHW.any()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "empty"),
        ([picture(8, 8), picture(8, 16)], "8x8, 8x16"),
        (np.zeros((4, 4)), r"\[H, W, C\]"),
        (torch.zeros(4, 4), r"\[C, H, W\]"),
        (torch.zeros(1, 4, 8, 8), r"got 4 in \[1, 4, 8, 8\].*transparency"),
        (torch.zeros(8, 9, 3), r"got 8 in \[8, 9, 3\]: a tensor's stand before height and width"),
        (np.zeros((3, 8, 9)), r"got 9 in \[3, 8, 9\]: an array's stand last"),
        (np.zeros((1, 8, 9, 4)), r"got 4 in \[1, 8, 9, 4\].*Leave the fourth out"),
        (torch.full((3, 2, 2), 255.0), "255"),
        (torch.full((3, 2, 2), float("nan")), "nan"),
        (np.zeros((2, 0, 3)), "is empty"),
        (torch.zeros(0, 3, 4, 4), "is empty"),
    ],
)
def test_a_picture_that_cannot_be_read_is_refused(images: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        to_tensor(images)


@pytest.mark.parametrize("images", ["cat.png", [None], np.zeros((3, 2, 2), dtype=np.int64)])
def test_what_is_no_picture_is_a_type_error(images: Any) -> None:
    with pytest.raises(TypeError, match="image must"):
        to_tensor(images)


def test_signed_values_are_refused_where_unit_ones_are_announced() -> None:
    with pytest.raises(ValueError, match="original_image must lie in"):
        to_tensor(-torch.ones(3, 2, 2), value_range=UNIT, name="original_image")


def test_pictures_leave_as_in_the_incumbent() -> None:
    theirs = pytest.importorskip("diffusers.utils.pil_utils")
    x_BCHW = torch.randn(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(pt_to_pil(x_BCHW), theirs.pt_to_pil(x_BCHW), strict=True):
        assert got.mode == expected.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_every_byte_survives_a_round_trip() -> None:
    levels_HWC = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    (back,) = pt_to_pil(to_tensor(Image.fromarray(levels_HWC)))
    np.testing.assert_array_equal(np.asarray(back), levels_HWC)


def test_the_outputs_differ_in_kind_and_range() -> None:
    x_BCHW = torch.linspace(-1.5, 1.5, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert to_output(x_BCHW, "pt") is x_BCHW
    array_BHWC = to_output(x_BCHW, "np")
    assert isinstance(array_BHWC, np.ndarray)
    assert array_BHWC.shape == (2, 4, 5, 3)
    assert (array_BHWC.min(), array_BHWC.max()) == (0, 1)
    assert [image.size for image in to_output(x_BCHW, "pil")] == [(5, 4)] * 2
    with pytest.raises(ValueError, match="'latent'"):
        to_output(x_BCHW, "latent")  # type: ignore[arg-type]


def test_half_precision_is_widened_before_it_is_rounded() -> None:
    x_BCHW = torch.linspace(-1, 1, 257, dtype=torch.bfloat16).reshape(1, 1, 1, 257)
    assert to_unit(x_BCHW).dtype == torch.float32
    np.testing.assert_array_equal(pt_to_numpy(x_BCHW), pt_to_numpy(x_BCHW.float()))


def test_one_channel_is_gray_and_one_picture_needs_no_batch() -> None:
    assert [image.mode for image in pt_to_pil(torch.zeros(2, 1, 1, 1))] == ["L", "L"]
    assert pt_to_pil(torch.zeros(3, 4, 5))[0].size == (5, 4)
    assert numpy_to_pil(np.zeros((4, 5, 4), dtype=np.uint8))[0].mode == "RGBA"


@pytest.mark.parametrize("images", [np.zeros((4, 5)), np.zeros((4, 5, 2)), np.full((4, 5, 3), 200.0)])
def test_an_array_that_is_no_picture_is_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images"):
        numpy_to_pil(images)
