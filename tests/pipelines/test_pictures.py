"""Pictures of every kind enter a stage as the same pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny

from floyd.pipelines.options import Options
from floyd.pipelines.pictures import masks, pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
UNIT = PIXELS.astype(np.float32) / 255
SIGNED = torch.from_numpy(UNIT).permute(2, 0, 1) * 2 - 1


def options(prompts: int = 1, each: int = 1) -> Options:
    return Options(prompt=["a"] * prompts, num_images_per_prompt=each, num_inference_steps=1, guidance_scale=1.0)


KINDS: dict[str, Any] = {
    "pil": Image.fromarray(PIXELS),
    "list of pil": [Image.fromarray(PIXELS)],
    "bytes": PIXELS,
    "array": UNIT,
    "batch of arrays": UNIT[None],
    "list of arrays": [UNIT],
    "tensor": SIGNED,
    "batch of tensors": SIGNED[None],
    "list of tensors": [SIGNED],
}


@pytest.mark.parametrize("image", KINDS.values(), ids=KINDS)
def test_every_kind_of_picture_is_the_same_pixels(image: Any) -> None:
    torch.testing.assert_close(pictures(image, options()), SIGNED[None], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_a_picture_of_any_mode_has_three_channels(mode: str) -> None:
    assert pictures(Image.fromarray(PIXELS).convert(mode), options()).shape == (1, 3, 6, 8)


def test_a_list_may_mix_arrays_and_tensors_each_in_its_own_range() -> None:
    both = pictures([UNIT, SIGNED], options(prompts=2))
    torch.testing.assert_close(both[0], both[1], atol=1e-6, rtol=0)


def test_the_images_of_a_prompt_stand_beside_each_other() -> None:
    batch = pictures(torch.stack([SIGNED, -SIGNED]), options(prompts=2, each=2))
    assert [bool(torch.equal(x, SIGNED)) for x in batch] == [True, True, False, False]


def test_one_mask_serves_all_images() -> None:
    mask = masks(torch.ones(6, 8), options(prompts=2), torch.Size((6, 8)))
    assert mask.shape == (1, 1, 6, 8)
    two = masks(torch.ones(2, 6, 8), options(prompts=2, each=2), torch.Size((6, 8)))
    assert two.shape == (4, 1, 6, 8)


def test_an_array_of_a_stage_is_understood_by_the_next(ours: dict[str, Any]) -> None:
    """In the incumbent "np" comes out in [0, 1] and goes in as if it were in [-1, 1]."""
    positive, negative = tiny.embeds()
    text = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "num_inference_steps": 1}

    def chained(output_type: str) -> torch.Tensor:
        first = ours["one"](**text, generator=torch.Generator().manual_seed(0), output_type=output_type).images
        second: torch.Tensor = ours["two"](
            image=first, **text, generator=torch.Generator().manual_seed(1), output_type="pt"
        ).images
        return second

    torch.testing.assert_close(chained("np"), chained("pt"), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("low", "wanted"), [((16, 32), (48, 96)), ((30, 20), (72, 48)), ((20, 20), (48, 48))])
def test_enlarging_keeps_the_shape_of_the_picture(
    ours: dict[str, Any], low: tuple[int, int], wanted: tuple[int, int]
) -> None:
    positive, negative = tiny.embeds()
    image = torch.zeros(1, 3, *low)
    task = ours["two"].task(image=image, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert tuple(task.canvas.picture_BCHW.shape[2:]) == wanted
