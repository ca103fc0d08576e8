"""What was painted goes into the picture; what the mask keeps is the picture's to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from floyd.images.composite import each, put_back, size_of

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
UNIT = np.random.default_rng(1).random((9, 14, 3), dtype=np.float32)
SIGNED = torch.rand(3, 9, 14, generator=torch.Generator().manual_seed(2)) * 2 - 1
MASK = np.zeros((9, 14), dtype=bool)
MASK[2:7, 3:11] = True

PICTURES: dict[str, Any] = {
    "pil": Image.fromarray(PIXELS),
    "bytes": PIXELS,
    "array": UNIT,
    "float64": UNIT.astype(np.float64),
    "tensor": SIGNED,
    "byte tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
}
PAINTED: dict[str, Any] = {
    "pil": [Image.new("RGB", (7, 5), (10, 200, 30))],
    "np": np.full((1, 5, 7, 3), 0.25, dtype=np.float32),
    "pt": torch.full((1, 3, 5, 7), -0.25),
}


def as_array(put: Any) -> np.ndarray:
    """[H, W, C] of the first."""
    if isinstance(put, torch.Tensor):
        return put[0].permute(1, 2, 0).numpy()
    return np.asarray(put[0])


def own_pixels(picture: Any, kind: str) -> np.ndarray:
    """The picture by itself, as that kind has it."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture)
    if isinstance(picture, torch.Tensor):
        picture = picture.permute(1, 2, 0).numpy()
        unit = picture / np.float32(2) + np.float32(0.5) if picture.dtype != np.uint8 else picture
    else:
        unit = picture
    signed = picture if unit is not picture else None  # a tensor of floats
    if unit.dtype == np.uint8:
        return {"pil": unit, "np": unit.astype(np.float32) / 255, "pt": unit.astype(np.float32) / 127.5 - 1}[kind]
    unit = unit.astype(np.float32)
    own = {"pil": (unit * 255).round().astype(np.uint8), "np": unit, "pt": 2 * unit - 1 if signed is None else signed}
    return own[kind]


@pytest.mark.parametrize("kind", PAINTED)
@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_what_is_kept_is_the_pictures_to_the_last_bit(picture: Any, kind: str) -> None:
    put = put_back(PAINTED[kind], picture, MASK)
    assert type(put) is type(PAINTED[kind])
    got = as_array(put)
    assert got.shape == (9, 14, 3)
    np.testing.assert_array_equal(got[~MASK], own_pixels(picture, kind)[~MASK])
    painted = as_array(PAINTED[kind])[0, 0].astype(np.float64)
    np.testing.assert_allclose(got[MASK], np.broadcast_to(painted, got[MASK].shape), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 20), width=st.integers(1, 20), factor=st.sampled_from([0.3, 1, 2.5]),
    feather=st.integers(0, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_no_size_and_no_feather_touches_what_is_kept(
    height: int, width: int, factor: float, feather: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = rng.random((height, width)) > 0.4
    painted = rng.integers(0, 256, (max(1, int(height * factor)), max(1, int(width * factor)), 3), dtype=np.uint8)
    (put,) = put_back([Image.fromarray(painted)], Image.fromarray(picture), mask, feather=feather)
    np.testing.assert_array_equal(np.asarray(put)[~mask], picture[~mask])


def test_a_seam_fades_in_within_what_is_repainted() -> None:
    picture, mask = np.zeros((5, 9, 3), dtype=np.float32), np.zeros((5, 9), dtype=bool)
    mask[:, 2:] = True
    put = put_back(np.ones((1, 5, 9, 3), dtype=np.float32), picture, mask, feather=3)
    np.testing.assert_allclose(as_array(put)[2, :, 0], [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_a_camera_held_upright_gives_an_upright_picture() -> None:
    lying = Image.fromarray(PIXELS)
    lying.getexif()[0x0112] = 6
    assert size_of(lying) == (14, 9)
    (put,) = put_back([Image.new("RGB", (9, 14))], lying, MASK.T)
    upright = np.asarray(Image.fromarray(PIXELS).transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(np.asarray(put)[~MASK.T], upright[~MASK.T])


def test_a_mask_of_another_size_is_fitted() -> None:
    large = np.kron(MASK, np.ones((3, 3), dtype=bool))
    ours, theirs = (as_array(put_back(PAINTED["np"], UNIT, mask)) for mask in (MASK, large))
    np.testing.assert_array_equal(ours, theirs)


def test_pictures_and_masks_are_repeated_as_prompts_are() -> None:
    pictures = [np.zeros((4, 4, 3), dtype=np.float32), np.ones((4, 4, 3), dtype=np.float32)]
    nothing = np.zeros((4, 4), dtype=bool)
    put = put_back(np.full((4, 4, 4, 3), 0.5, dtype=np.float32), pictures, [nothing, ~nothing])
    assert put[:, 0, 0, 0].tolist() == [0, 0, 0.5, 0.5]
    assert put_back(np.full((2, 4, 4, 3), 0.5), np.stack(pictures), nothing)[:, 0, 0, 0].tolist() == [0, 1]  # type: ignore[call-overload]


def test_pictures_of_several_sizes_come_back_as_a_list_alone() -> None:
    pictures = [Image.new("RGB", (4, 4)), Image.new("RGB", (8, 8))]
    masks = [np.ones((4, 4), dtype=bool)] * 2
    assert [put.size for put in put_back(PAINTED["pil"] * 2, pictures, masks)] == [(4, 4), (8, 8)]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="paint with 'pil'"):
        put_back(np.zeros((2, 4, 4, 3)), pictures, masks)


def test_a_batch_is_taken_apart() -> None:
    apart = each([np.zeros((2, 4, 4, 3)), np.zeros((5, 4, 3))])
    assert [np.shape(one) for one in apart] == [(4, 4, 3), (4, 4, 3), (5, 4, 3)]
    assert len(each(torch.zeros(3, 3, 4, 4))) == 3
    for mask in (torch.ones(2, 1, 9, 14), np.ones((2, 9, 14, 1)), np.ones((2, 9, 14))):
        assert len(put_back(PAINTED["pil"] * 2, PICTURES["pil"], mask)) == 2


@pytest.mark.parametrize("feather", [-1, 0.5, True, None])
def test_a_feather_that_is_no_number_of_pixels_is_refused(feather: Any) -> None:
    with pytest.raises(ValueError, match="feather must be a number of pixels"):
        put_back(PAINTED["np"], UNIT, MASK, feather=feather)


def test_counts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="2 of picture for 1 painted"):
        put_back(PAINTED["np"], [UNIT, UNIT], MASK)
    with pytest.raises(ValueError, match="0 of mask_image for 1 painted"):
        put_back(PAINTED["np"], UNIT, [])


def test_a_tensor_of_stage_three_is_put_back_in_its_own_range() -> None:
    """It comes in [0, 1], those of the other stages in [-1, 1]."""
    unit = torch.rand(1, 3, 18, 28, generator=torch.Generator().manual_seed(3))
    put = put_back(unit, SIGNED, MASK, value_range=(0, 1))
    assert torch.equal(put, put_back(2 * unit - 1, SIGNED, MASK))
    assert torch.equal(put[0, :, ~torch.from_numpy(MASK)], SIGNED[:, ~torch.from_numpy(MASK)])


def test_a_tensor_of_either_range_is_asked_for_and_not_guessed_at() -> None:
    bright = torch.full((1, 3, 5, 7), 0.5)
    with pytest.raises(ValueError, match=r"value_range=\(0, 1\) if it is stage III's"):
        put_back(bright, SIGNED, MASK)
    assert (put_back(bright, SIGNED, MASK, value_range=(-1, 1))[0, :, 4, 5] == 0.5).all()
    with pytest.raises(ValueError, match=r"must be \(-1, 1\) or \(0, 1\)"):
        put_back(bright, SIGNED, MASK, value_range=(0, 255))
    with pytest.raises(ValueError, match="have only one"):
        put_back(PAINTED["np"], SIGNED, MASK, value_range=(0, 1))
