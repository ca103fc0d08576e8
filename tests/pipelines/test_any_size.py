"""Any height and width is painted, at exactly that size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests import tiny
from tests.pipelines.halving import MULTIPLE, painted, pipeline
from torch import Tensor

import floyd.pipelines.deepfloyd_if as family
from floyd.diffusion.engine import STOP

SIDES = st.integers(1, 40)
POSITIVE, NEGATIVE = tiny.embeds()
READ: dict[str, Any] = {"prompt_embeds": POSITIVE, "negative_prompt_embeds": NEGATIVE}


def tensor(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def rounded(side: int) -> int:
    return -(-side // MULTIPLE) * MULTIPLE


@settings(max_examples=40, deadline=None)
@given(height=SIDES, width=SIDES)
def test_stage_one_paints_any_size_on_a_canvas_that_the_network_can_halve(height: int, width: int) -> None:
    pipe = pipeline("IFPipeline")
    images = painted(pipe, height=height, width=width).images
    assert images.shape == (1, 3, height, width)
    assert images.is_contiguous()
    assert images.isfinite().all()
    assert {tuple(x.shape[2:]) for x in pipe.unet.seen} == {(rounded(height), rounded(width))}


@settings(max_examples=40, deadline=None)
@given(height=SIDES, width=SIDES, name=st.sampled_from(["IFImg2ImgPipeline", "IFImg2ImgSuperResolutionPipeline"]))
def test_a_given_picture_keeps_its_size(height: int, width: int, name: str) -> None:
    key = "original_image" if "SuperResolution" in name else "image"
    low = {"image": tensor(5, 7)} if "SuperResolution" in name else {}
    pipe = pipeline(name)
    for picture in (tensor(height, width), np.random.default_rng(0).random((height, width, 3))):
        assert painted(pipe, **{**low, key: picture}).images.shape == (1, 3, height, width)
    assert {tuple(x.shape[2:]) for x in pipe.unet.seen} == {(rounded(height), rounded(width))}


@settings(max_examples=40, deadline=None)
@given(rows=SIDES, columns=SIDES)
def test_an_enlarged_picture_follows_the_shape_of_the_small_one(rows: int, columns: int) -> None:
    """Its short side becomes the network's; if one side is given, the other follows."""
    low, pipe = tensor(rows, columns), pipeline("IFSuperResolutionPipeline")
    short = min(rows, columns)
    expected = (round(32 * rows / short), round(32 * columns / short))
    assert painted(pipe, image=low, num_inference_steps=1).images.shape[2:] == expected
    height = painted(pipe, image=low, height=20, num_inference_steps=1).images.shape[2:]
    assert height == (20, max(1, round(20 * columns / rows)))
    width = painted(pipe, image=low, width=20, num_inference_steps=1).images.shape[2:]
    assert width == (max(1, round(20 * rows / columns)), 20)
    assert painted(pipe, image=low, height=9, width=33, num_inference_steps=1).images.shape[2:] == (9, 33)


def test_the_sizes_of_the_document_enlarge_as_it_says() -> None:
    pipe = pipeline("IFSuperResolutionPipeline")
    pipe.unet.config.sample_size = 256

    def enlarged(low: Any) -> tuple[int, int]:
        """Width and height."""
        height, width = pipe.task(image=low, **READ_SHORT).canvas.sides
        return width, height

    assert enlarged(Image.new("RGB", (96, 64))) == (384, 256)
    assert enlarged(tensor(64, 96)) == (384, 256)
    assert enlarged(tensor(50, 70)) == (358, 256)
    assert enlarged(tensor(64, 64)) == (256, 256)


READ_SHORT: dict[str, Any] = {"prompt_embeds": torch.ones(1, 2, 4), "guidance_scale": 1.0}


def test_picture_and_small_picture_are_continued_by_their_edges() -> None:
    pipe = pipeline("IFImg2ImgSuperResolutionPipeline")
    original, low = tensor(11, 21), tensor(5, 7, seed=1)
    painted(pipe, image=low, original_image=original, noise_level=0, strength=0.34, timesteps=[3, 2, 1])
    noise = [torch.randn(1, 3, 16, 24, generator=g) for g in [torch.Generator().manual_seed(0)] for _ in range(2)]
    enlarged = F.interpolate(low, (11, 21), mode="bilinear", align_corners=True)
    pairs = ((original, pipe.scheduler.schedule, 1), (enlarged, pipe.image_noising_scheduler.schedule, 0))
    wanted = [
        schedule.noised(F.pad(part, (0, 3, 0, 5), mode="replicate"), draw, t)
        for (part, schedule, t), draw in zip(pairs, noise, strict=True)
    ]
    torch.testing.assert_close(pipe.unet.seen[0][:1], torch.cat(wanted, dim=1))


def test_a_size_that_fits_is_shown_to_the_network_as_it_is() -> None:
    """And draws no more noise than it has pixels."""
    pipe = pipeline("IFPipeline")
    painted(pipe, height=16, width=24)
    start = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe.unet.seen[0], torch.cat([start, start]))


@pytest.mark.parametrize("name", [n for n in family.__all__ if n.endswith("Pipeline")])
def test_a_real_network_paints_odd_sizes_with_every_task(ours: dict[str, Any], name: str) -> None:
    is_second = "SuperResolution" in name
    pipe = getattr(family, name)(**ours["two" if is_second else "one"].components)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"image": tensor(9, 13)} if is_second else {}
    if "Img2Img" in name or "Inpainting" in name:
        arguments["original_image" if is_second else "image"] = tensor(21, 33)
    if "Inpainting" in name:
        arguments["mask_image"] = torch.ones(21, 33)
    if name in ("IFPipeline", "IFSuperResolutionPipeline"):
        arguments |= {"height": 21, "width": 33}
    images = pipe(**arguments, **READ, num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 21, 33)
    assert images.isfinite().all()


def test_whoever_watches_sees_the_size_that_was_asked_for() -> None:
    pipe, seen = pipeline("IFPipeline"), []

    def look(i: int, t: int, x_BCHW: Tensor) -> None:
        seen.append(x_BCHW.shape[2:])

    def step_end(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.extend(x.shape[2:] for x in tensors.values())
        return tensors

    told: dict[str, Any] = {"callback": look, "callback_on_step_end": step_end}
    whole = painted(pipe, height=13, width=9, **told, callback_on_step_end_tensor_inputs=["x", "clean"]).images
    assert set(seen) == {(13, 9)}
    assert len(seen) == 9
    assert torch.equal(whole, painted(pipe, height=13, width=9).images), "what comes back unchanged changes nothing"

    task = pipe.task(
        height=13, width=9, num_inference_steps=3, generator=torch.Generator().manual_seed(0), **READ_SHORT
    )
    moves = list(pipe.watch(task))
    assert {part.shape[2:] for move in moves for part in (move.x_BCHW, move.clean_BCHW)} == {(13, 9)}
    stopped = painted(pipe, height=13, width=9, callback=lambda i, t, x: STOP)
    assert stopped.images.shape[2:] == (13, 9)


def test_what_a_callback_changes_is_gone_on_with() -> None:
    pipe = pipeline("IFPipeline")

    def blank(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"x": torch.zeros_like(tensors["x"])}

    told: dict[str, Any] = {"callback_on_step_end": blank, "callback_on_step_end_tensor_inputs": ["x"]}
    images = painted(pipe, height=13, width=9, **told).images
    assert torch.equal(images, torch.zeros(1, 3, 13, 9))
    for x_BCHW in pipe.unet.seen[1:]:
        assert not x_BCHW[..., :13, :9].any()
        assert x_BCHW[..., 13:, :].any(), "the margin goes on as it was"


def test_several_images_and_their_generators_share_an_odd_canvas() -> None:
    pipe = pipeline("IFPipeline")

    def paint(*seeds: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images: Tensor = painted(pipe, height=9, width=9, generator=generators, num_images_per_prompt=len(seeds)).images
        return images

    torch.testing.assert_close(paint(1, 2)[1:], paint(2))
