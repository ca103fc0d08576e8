from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from floyd.images.mask import mask_to_tensor
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
