from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from floyd.images.mask import mask_to_tensor, softened
from floyd.images.resize import resize_short_side

LEFT_HW = np.zeros((4, 6), dtype=bool)
LEFT_HW[:, :3] = True


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(LEFT_HW.astype(np.uint8) * 255),
        Image.fromarray(LEFT_HW.astype(np.uint8) * 255).convert("RGBA"),
        LEFT_HW,
        LEFT_HW[None],
        LEFT_HW[None, ..., None].astype(np.float64),
        [LEFT_HW.astype(np.float32)],
        LEFT_HW.astype(np.uint8) * 255,
        torch.from_numpy(LEFT_HW),
        torch.from_numpy(LEFT_HW)[None, None].half(),
    ],
    ids=range(9),
)
def test_every_kind_of_mask_is_read(mask: Any) -> None:
    mask_B1HW = mask_to_tensor(mask)
    assert mask_B1HW.dtype == torch.float32
    assert torch.equal(mask_B1HW, torch.from_numpy(LEFT_HW)[None, None].float())


def test_a_picture_is_split_as_in_the_incumbent() -> None:
    module = pytest.importorskip("diffusers.pipelines.deepfloyd_if.pipeline_if_inpainting")
    model = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(sample_size=16)))
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14), dtype=np.uint8))
    expected_B1HW = module.IFInpaintingPipeline.preprocess_mask_image(model, [mask, mask])
    got_B1HW = mask_to_tensor([mask, mask], resize=lambda given: resize_short_side(given, 16))
    assert torch.equal(got_B1HW, expected_B1HW)
    assert 0 < got_B1HW.mean() < 1


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), factor=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_mask_enlarged_and_fitted_again_is_the_same(height: int, width: int, factor: int, seed: int) -> None:
    mask_HW = np.random.default_rng(seed).random((height, width)) > 0.5
    large_HW = np.kron(mask_HW, np.ones((factor, factor), dtype=bool))
    expected = torch.from_numpy(mask_HW)[None, None].float()
    for large in (large_HW, torch.from_numpy(large_HW), Image.fromarray(large_HW.astype(np.uint8) * 255)):
        assert torch.equal(mask_to_tensor(large, size=(height, width)), expected)
    assert torch.equal(mask_to_tensor(mask_HW, size=large_HW.shape), torch.from_numpy(large_HW)[None, None].float())


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), scale=st.floats(0.1, 6), white=st.booleans())
def test_a_mask_of_the_same_shape_fits_at_any_size_and_one_colour_stays_one(
    height: int, width: int, scale: float, white: bool
) -> None:
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    mask = mask_to_tensor(np.full((height, width), white), size=size)
    assert mask.shape == (1, 1, *size)
    assert (mask == float(white)).all()


def test_what_is_shrunk_is_averaged_and_what_is_enlarged_takes_the_nearest() -> None:
    fine = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0]])
    assert mask_to_tensor(fine, size=(1, 2)).tolist() == [[[[0, 1]]]]
    assert mask_to_tensor(torch.tensor([[0.6, 0.2]]), size=(2, 4)).tolist() == [[[[1, 1, 0, 0], [1, 1, 0, 0]]]]


def test_a_mask_may_have_the_shape_of_the_picture_before_it_was_resized() -> None:
    """A photo of 52x40 px becomes 40x32 px, which is not quite its shape."""
    assert mask_to_tensor(torch.ones(40, 52), size=(32, 40), shapes=[(40, 52)]).shape == (1, 1, 32, 40)
    with pytest.raises(ValueError, match="52x40 px, the picture 40x32 px"):
        mask_to_tensor(torch.ones(40, 52), size=(32, 40))


@pytest.mark.parametrize("mask", [torch.ones(8, 16), Image.new("L", (16, 8)), np.ones((2, 8, 16), dtype=bool)])
def test_a_mask_of_another_shape_is_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match=r"mask_image is 16x8 px, the picture 40x40 px.*give both the same shape"):
        mask_to_tensor(mask, size=(40, 40))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 14), width=st.integers(1, 14), feather=st.integers(0, 8), seed=st.integers(0, 99))
def test_a_softened_mask_keeps_what_is_kept_and_never_falls(height: int, width: int, feather: int, seed: int) -> None:
    mask = (torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed)) > 0.3).float()
    soft = softened(mask, feather)
    assert torch.equal(soft == 0, mask == 0)
    assert (soft <= mask).all()
    assert torch.equal(softened(mask, 0), mask)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    kept = [(int(y), int(x)) for y, x in (mask[0, 0] == 0).nonzero()]
    away = torch.full((height, width), 99)
    for y, x in kept:
        away = torch.minimum(away, torch.maximum((rows - y).abs(), (columns - x).abs()))
    torch.testing.assert_close(soft[0, 0], (away.float() / (feather + 1)).clamp(max=1))


def test_half_is_repainted() -> None:
    assert mask_to_tensor(torch.tensor([[0.499, 0.5, 0.501]])).tolist() == [[[[0, 1, 1]]]]
    assert mask_to_tensor(np.array([[127, 128]], dtype=np.uint8)).tolist() == [[[[0, 1]]]]


def test_the_given_mask_is_left_as_it_is() -> None:
    given_HW = torch.tensor([[0.25, 0.75]])
    mask_to_tensor(given_HW)
    assert given_HW.tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([], "empty"),
        (torch.zeros(4), r"got \[4\]"),
        (torch.zeros(1, 3, 4, 4), r"got \[1, 3, 4, 4\]"),
        (torch.full((4, 4), 255.0), "255"),
        (np.ones((4, 4), dtype=np.uint8), "uint8 of 0 and 1"),
        (Image.fromarray(np.ones((4, 4), dtype=np.uint8)), "uint8 of 0 and 1"),
        (Image.fromarray(np.full((4, 4), 0.7, dtype=np.float32)), "scale it first"),
        (np.zeros((0, 4)), "is empty"),
        ([torch.zeros(4, 4), torch.zeros(4, 8)], "4x4, 8x4"),
    ],
)
def test_a_mask_that_cannot_be_read_is_refused(mask: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mask_to_tensor(mask)


@pytest.mark.parametrize("mask", ["mask.png", np.zeros((4, 4), dtype=np.int64)])
def test_what_is_no_mask_is_a_type_error(mask: Any) -> None:
    with pytest.raises(TypeError, match="mask_image must"):
        mask_to_tensor(mask)
