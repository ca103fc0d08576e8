"""Stage III against the incumbent, and what it does better."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.pipelines.compare import assert_same, call_both

from floyd.pipelines.upscale import StableDiffusionUpscalePipeline

PROMPT = "A red circle above the blue square!"
TENSOR = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1
PICTURE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (16, 20, 3), dtype=np.uint8))

CALLS: dict[str, dict[str, Any]] = {
    "a picture": {"prompt": PROMPT, "image": PICTURE, "output_type": "np"},
    "pictures come back": {"prompt": PROMPT, "image": PICTURE, "output_type": "pil"},
    "a tensor": {"prompt": PROMPT, "image": TENSOR[:1]},
    "two prompts": {"prompt": [PROMPT, "a cat"], "image": TENSOR, "negative_prompt": ["blue", "dog"]},
    "a generator for each image": {"prompt": [PROMPT, "a cat"], "image": TENSOR, "seeds": [1, 2]},
    "no guidance": {"prompt": PROMPT, "image": TENSOR[:1], "guidance_scale": 1.0},
    "noise at every step": {"prompt": PROMPT, "image": TENSOR[:1], "eta": 1.0},
    "latents given": {"prompt": PROMPT, "image": TENSOR[:1], "latents": TENSOR[:1].new_zeros(1, 4, 16, 24) + 0.3},
    "latents wanted": {"prompt": PROMPT, "image": TENSOR[:1], "output_type": "latent"},
    "much noise": {"prompt": PROMPT, "image": TENSOR[:1], "noise_level": 350},
}


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_stage_three_is_the_incumbents(ours: dict[str, Any], theirs: dict[str, Any], arguments: dict[str, Any]) -> None:
    given = {"num_inference_steps": 2, "output_type": "pt", **arguments}
    mine, other = call_both(ours["three"], theirs["three"], **given)
    assert_same(mine.images, other.images)


@pytest.mark.parametrize("size", [(23, 18), (7, 5), (1, 1)])
def test_every_size_becomes_four_times_as_large(ours: dict[str, Any], size: tuple[int, int]) -> None:
    """The incumbent shrinks it to multiples of four first, 23x18 to 20x16."""
    width, height = size
    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    (picture,) = ours["three"](PROMPT, Image.fromarray(pixels), 1).images
    assert picture.size == (4 * width, 4 * height)
    array = ours["three"](PROMPT, pixels, 1, output_type="np").images
    assert array.shape == (1, 4 * height, 4 * width, 3)
    assert np.isfinite(array).all()


def test_encode_prompt_and_constructor_take_the_incumbents_arguments() -> None:
    other = diffusers.StableDiffusionUpscalePipeline
    for name in ("encode_prompt", "__init__"):
        ours = inspect.signature(getattr(StableDiffusionUpscalePipeline, name)).parameters
        ours = {name: p for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY}
        assert list(ours) == list(inspect.signature(getattr(other, name)).parameters)


def test_encoding_first_is_the_incumbents(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    mine = ours["three"].encode_prompt(PROMPT, "cpu", 2, True, "blue")
    with torch.no_grad():
        other = theirs["three"].encode_prompt(PROMPT, "cpu", 2, True, "blue")
    for a, b in zip(mine, other, strict=True):
        assert_same(a, b, atol=1e-6)


def test_layers_of_clip_can_be_left_out(ours: dict[str, Any]) -> None:
    """The incumbent cannot, with transformers 5: it looks for the norm where it no longer is."""
    whole, _ = ours["three"].encode_prompt(PROMPT)
    fewer = ours["three"].task(prompt=PROMPT, image=TENSOR[:1], clip_skip=1).text.positive
    assert fewer.shape == whole.shape
    assert not torch.allclose(fewer, whole, atol=1e-3)


def test_images_of_a_prompt_get_its_picture_and_noise_of_their_own(ours: dict[str, Any]) -> None:
    """The incumbent hands prompts p0 p0 p1 p1 the pictures i0 i1 i0 i1, all with one draw of noise."""
    task = ours["three"].task(prompt=[PROMPT, "a cat"], image=TENSOR, num_images_per_prompt=2, num_inference_steps=1)
    assert task.low_res is not None
    expected = [TENSOR[0], TENSOR[0], TENSOR[1], TENSOR[1]]
    assert all(torch.equal(a, b) for a, b in zip(task.low_res.picture_BCHW, expected, strict=True))
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2, 1, 2)]
    images = ours["three"](
        [PROMPT, "a cat"], TENSOR, 1, num_images_per_prompt=2, generator=seeds, output_type="pt", guidance_scale=1.0
    ).images
    alone = ours["three"](
        PROMPT, TENSOR[:1], 1, generator=torch.Generator().manual_seed(2), output_type="pt", guidance_scale=1.0
    ).images
    torch.testing.assert_close(images[1], alone[0], atol=1e-4, rtol=0)


def test_a_bright_tensor_is_read_as_it_is(ours: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """The incumbent takes a tensor without negative values for [0, 1] and stretches it."""
    bright = TENSOR[:1].abs()
    task = ours["three"].task(prompt=PROMPT, image=bright)
    assert task.low_res is not None
    assert torch.equal(task.low_res.picture_BCHW, bright)
    assert "without a negative value" in caplog.text


def test_half_precision_latents_are_decoded_in_float32_and_the_vae_stays_as_it_is(
    folders: dict[str, Any], ours: dict[str, Any]
) -> None:
    pipe = StableDiffusionUpscalePipeline.from_pretrained(folders["three"], vae=ours["three"].vae)
    full = pipe.decode(torch.ones(1, 4, 8, 8))
    half = StableDiffusionUpscalePipeline.from_pretrained(folders["three"], torch_dtype=torch.float16)
    assert half.vae.config.force_upcast
    torch.testing.assert_close(half.decode(torch.ones(1, 4, 8, 8)), full, atol=0.02, rtol=0)
    assert half.vae.dtype == torch.float16


def test_another_scaling_factor_is_replaced_with_a_word(ours: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    vae = type(ours["three"].vae)(**{**tiny.VAE, "scaling_factor": 0.18215})
    StableDiffusionUpscalePipeline(**{**ours["three"].components, "vae": vae})
    assert "scaling_factor is 0.18215; stage III uses 0.08333" in caplog.text


def test_parts_that_do_not_belong_together_are_refused(ours: dict[str, Any]) -> None:
    ours["three"].unet = ours["one"].unet
    with pytest.raises(ValueError, match="reads 3 channels, but latents and picture have 7"):
        ours["three"](PROMPT, TENSOR[:1])


def test_a_tuple_is_pictures_and_flags(ours: dict[str, Any]) -> None:
    images, nsfw = ours["three"](PROMPT, TENSOR[:1], 1, output_type="pt", return_dict=False)
    assert images.shape == (1, 3, 64, 96)
    assert nsfw is None
    assert 0 <= images.min() <= images.max() <= 1


def test_lora_scale_is_said_to_be_wasted(ours: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ours["three"].encode_prompt("a", lora_scale=0.5)
    assert "no effect" in caplog.text
