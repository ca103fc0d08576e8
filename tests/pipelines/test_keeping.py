"""What an inpainting keeps is the given picture's, to the last bit, at every stage and size, in every kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests import tiny
from tests.pipelines.halving import painted, pipeline

import floyd
from floyd.images.composite import put_back
from floyd.models.watermark import IFWatermarker
from floyd.pipelines.deepfloyd_if import IFInpaintingPipeline, IFInpaintingSuperResolutionPipeline
from floyd.pipelines.output import IFInpaintingOutput, IFPipelineOutput

STAGES = ("IFInpaintingPipeline", "IFInpaintingSuperResolutionPipeline")
SIDE = {STAGES[0]: 16, STAGES[1]: 32}
LOW = torch.zeros(1, 3, 6, 6)
SIDES = st.integers(1, 36)


def inpainted(name: str, picture: Any, mask: Any, pipe: Any = None, **arguments: Any) -> Any:
    given = {"original_image": picture, "image": LOW} if "SuperResolution" in name else {"image": picture}
    return painted(pipe or pipeline(name), **given, mask_image=mask, **arguments)


def given_as(kind: str, height: int, width: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    if kind == "pt":
        return torch.from_numpy(rng.random((3, height, width), dtype=np.float32)) * 2 - 1
    if kind == "np":
        return rng.random((height, width, 3), dtype=np.float32)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(images: Any, place: int = 0) -> np.ndarray:
    """[H, W, C]."""
    if isinstance(images, torch.Tensor):
        return images[place].permute(1, 2, 0).numpy()
    return np.asarray(images[place])


@settings(max_examples=60, deadline=None)
@given(
    height=SIDES, width=SIDES, kind=st.sampled_from(["pt", "np", "pil"]), name=st.sampled_from(STAGES),
    seed=st.integers(0, 99), feather=st.integers(0, 3), resamples=st.integers(1, 3),
)  # fmt: skip
def test_what_is_kept_comes_back_to_the_last_bit(
    height: int, width: int, kind: str, name: str, seed: int, feather: int, resamples: int
) -> None:
    """Floats as the kind they came in, bytes as PIL pictures."""
    picture = given_as(kind, height, width, seed)
    mask = np.random.default_rng(seed).random((height, width)) > 0.5
    options = {"feather": min(feather, height, width), "resamples": resamples, "output_type": kind}
    output = inpainted(name, picture, mask, **options)
    own = picture.permute(1, 2, 0).numpy() if kind == "pt" else picture
    got = pixels(output.images)
    assert got.shape == (height, width, 3)
    np.testing.assert_array_equal(got[~mask], own[~mask])
    np.testing.assert_array_equal(pixels(output.full_size()), got)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("size", [(50, 40), (23, 31), (12, 12)])
def test_a_picture_comes_back_at_its_own_size(name: str, output_type: str, size: tuple[int, int]) -> None:
    height, width = size
    original = given_as("pil", height, width, 0)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 255
    output = inpainted(name, Image.fromarray(original), Image.fromarray(mask), output_type=output_type)
    assert isinstance(output, IFInpaintingOutput)
    assert min(pixels(output.images).shape[:2]) == SIDE[name], "as the incumbent's"
    got, kept = pixels(output.full_size()), mask == 0
    own = {"pil": original, "np": original.astype(np.float32) / 255, "pt": original.astype(np.float32) / 127.5 - 1}
    np.testing.assert_array_equal(got[kept], own[output_type][kept])
    assert (got != own[output_type]).any(), "something was painted"


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_after_each_of_three_stages_the_rest_is_the_given_picture(ours: dict[str, Any], output_type: str) -> None:
    """Repaint a part of this photo, is what a user asks for."""
    original = given_as("pil", 60, 72, 0)
    mask = np.zeros((60, 72), dtype=bool)
    mask[10:40, 20:50] = True
    photo, own = Image.fromarray(original), {"pil": original, "np": original.astype(np.float32) / 255}
    own["pt"] = original.astype(np.float32) / 127.5 - 1
    for stage in ours.values():
        stage.watermarker = stage.safety_checker = None  # ours is drawn last, on PIL pictures alone
    text = dict(zip(("prompt_embeds", "negative_prompt_embeds"), tiny.embeds(), strict=True))
    told = {**text, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": output_type}
    first = IFInpaintingPipeline(**ours["one"].components)(image=photo, mask_image=mask, **told)
    second = IFInpaintingSuperResolutionPipeline(**ours["two"].components)(
        image=first.images, original_image=photo, mask_image=mask, **told
    )
    third = ours["three"](image=second.images, **told).images
    value_range = (0, 1) if output_type == "pt" else None
    for images in (first.full_size(), second.full_size(), put_back(third, photo, mask, value_range=value_range)):
        got = pixels(images)
        np.testing.assert_array_equal(got[~mask], own[output_type][~mask])
        assert (got[mask] != own[output_type][mask]).mean() > 0.9


def test_pictures_of_a_batch_come_back_each_at_its_own_size() -> None:
    """They have one shape, but several sizes."""
    originals = [given_as("pil", 30, 60, 0), given_as("pil", 20, 40, 1)]
    masks = [np.zeros(picture.shape[:2], dtype=bool) for picture in originals]
    for mask in masks:
        mask[:8] = True
    text = {"prompt_embeds": torch.ones(2, 2, 4), "negative_prompt_embeds": torch.zeros(2, 2, 4)}
    output = inpainted(
        STAGES[0], [Image.fromarray(picture) for picture in originals], masks, **text, num_images_per_prompt=2,
        output_type="pil",
    )  # fmt: skip
    full = output.full_size()
    assert [image.size for image in full] == [(60, 30)] * 2 + [(40, 20)] * 2
    for place, image in enumerate(full):
        kept = ~masks[place // 2]
        np.testing.assert_array_equal(np.asarray(image)[kept], originals[place // 2][kept])


@pytest.mark.parametrize("mask_size", [(20, 16), (100, 80), (5, 4)])
@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_a_mask_of_any_size_is_fitted_to_the_picture(mask_size: tuple[int, int], kind: str) -> None:
    picture, mask = given_as(kind, 20, 16, 0), np.zeros(mask_size, dtype=bool)
    mask[: mask_size[0] * 2 // 5] = True
    for same in (mask, torch.from_numpy(mask), Image.fromarray(mask)):
        output = inpainted(STAGES[0], picture, same, output_type=kind)
        own = picture.permute(1, 2, 0).numpy() if kind == "pt" else picture
        np.testing.assert_array_equal(pixels(output.images)[8:], own[8:])
        assert (pixels(output.images)[:8] != own[:8]).mean() > 0.9


def test_picture_and_mask_lie_as_the_camera_says() -> None:
    original, mask = given_as("pil", 20, 30, 0), np.zeros((20, 30), dtype=np.uint8)
    mask[:, 15:] = 255
    lying = [Image.fromarray(part) for part in (original, mask)]
    for part in lying:
        part.getexif()[0x0112] = 3  # upside down
    full = inpainted(STAGES[0], *lying, output_type="pil").full_size()
    np.testing.assert_array_equal(np.asarray(full[0])[:, 15:], original[::-1, ::-1][:, 15:])


def test_a_feather_softens_within_what_is_repainted() -> None:
    picture, mask = given_as("pt", 16, 16, 0), torch.zeros(16, 16)
    mask[:, 4:] = 1
    hard, soft = (inpainted(STAGES[0], picture, mask, feather=width).images for width in (0, 3))
    weight = (torch.tensor([0, 0, 0, 0, 0.25, 0.5, 0.75] + [1.0] * 9)).expand(1, 1, 16, 16)
    torch.testing.assert_close(soft, (1 - weight) * picture + weight * hard)
    assert torch.equal(soft[..., 7:], hard[..., 7:])


@pytest.mark.parametrize("resamples", [1, 2])
def test_watching_ends_where_the_call_ends(resamples: int) -> None:
    pipe = pipeline(STAGES[0])
    picture, mask = given_as("pt", 13, 9, 0), torch.zeros(13, 9)
    mask[:, 3:] = 1
    told = {"feather": 2, "resamples": resamples, "num_inference_steps": 3}
    called = inpainted(STAGES[0], picture, mask, pipe, **told).images
    task = pipe.task(
        image=picture, mask_image=mask, prompt_embeds=torch.ones(1, 2, 4), negative_prompt_embeds=torch.zeros(1, 2, 4),
        generator=torch.Generator().manual_seed(0), **told,
    )  # fmt: skip
    moves = list(pipe.watch(task))
    assert len(moves) == len(task.steps) == (3 if resamples == 1 else 5)
    assert torch.equal(moves[-1].x_BCHW, called)
    for move in moves:
        assert torch.equal(move.clean_BCHW[..., :3], picture[None, ..., :3])


@pytest.mark.parametrize("name", [name for name in floyd.__all__ if name.endswith("Scheduler")])
def test_any_scheduler_resamples(name: str) -> None:
    pipe = pipeline(STAGES[0])
    pipe.scheduler = getattr(floyd, name).from_config(pipe.scheduler.config)
    picture, mask = given_as("pt", 11, 18, 0), torch.zeros(11, 18)
    mask[2:8] = 1
    output = inpainted(STAGES[0], picture, mask, pipe, resamples=3, num_inference_steps=4)
    assert output.images.isfinite().all()
    assert torch.equal(output.images[0, :, 8:], picture[:, 8:])
    kept = [x_BCHW[..., 8:, :] for x_BCHW in pipe.unet.seen]
    assert not any(torch.equal(x[:1, :, :3, :18], picture[None, :, 8:]) for x in kept), "the network sees it noised"


def test_one_pass_shows_the_network_the_clean_picture_as_the_incumbent_does() -> None:
    pipe = pipeline(STAGES[0])
    picture, mask = given_as("pt", 16, 16, 0), torch.zeros(16, 16)
    mask[:8] = 1
    inpainted(STAGES[0], picture, mask, pipe, resamples=1)
    assert len(pipe.unet.seen) == 3
    for x_BCHW in pipe.unet.seen:
        assert torch.equal(x_BCHW[0, :, 8:], picture[:, 8:])


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_an_image_that_is_resampled_depends_on_its_own_seed_alone(scheduler: str) -> None:
    pipe = pipeline(STAGES[0])
    pipe.scheduler = getattr(floyd, scheduler).from_config(pipe.scheduler.config)
    picture, mask = given_as("pt", 9, 12, 0), torch.zeros(9, 12)
    mask[2:6] = 1

    def paint(*seeds: int, **options: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        told = {"generator": generators, "num_images_per_prompt": len(seeds), "resamples": 2, **options}
        images: torch.Tensor = inpainted(STAGES[0], picture, mask, pipe, **told).images
        return images

    torch.testing.assert_close(paint(1, 2)[1:], paint(2), atol=1e-4, rtol=0)
    assert torch.equal(paint(1, 2, batch_invariant=True)[1:], paint(2, batch_invariant=True))


class Verdict:
    """A checker that finds the first picture unsafe."""

    dtype = torch.float32
    device = torch.device("cpu")

    def scores(self, pictures: torch.Tensor) -> Any:
        from floyd.models.safety import SafetyScores

        unsafe = torch.tensor([5.0] + [-5.0] * (len(pictures) - 1))
        return SafetyScores(unsafe, torch.full((len(pictures),), -5.0))


def guarded() -> Any:
    """An inpainting with the checker, which has no weights to move."""
    pipe = pipeline(STAGES[0])
    pipe.safety_checker = Verdict()
    pipe.feature_extractor = lambda pictures, return_tensors: SimpleNamespace(
        pixel_values=torch.zeros(len(pictures), 3, 2, 2)
    )
    pipe._placement = SimpleNamespace(use=_Used, device_of=lambda module: torch.device("cpu"))
    return pipe


class _Used:
    def __init__(self, module: Any) -> None:
        self.module = module

    def __enter__(self) -> Any:
        return self.module

    def __exit__(self, *error: Any) -> None:
        """Nothing was moved."""


@pytest.mark.parametrize(("size", "output_type"), [((16, 16), "np"), ((40, 50), "pil"), ((40, 50), "np")])
def test_nothing_is_put_back_into_a_picture_that_was_hidden(size: tuple[int, int], output_type: str) -> None:
    original, mask = given_as("pil", *size, 0), np.zeros(size, dtype=bool)
    mask[:4] = True
    told = {"num_images_per_prompt": 2, "output_type": output_type}
    output = inpainted(STAGES[0], Image.fromarray(original), mask, guarded(), **told)
    assert output.nsfw_detected == [True, False]
    for images in (output.images, output.full_size()):
        assert not pixels(images, 0).any()
    own = original if output_type == "pil" else original.astype(np.float32) / 255
    np.testing.assert_array_equal(pixels(output.full_size(), 1)[4:], own[4:])

    flagged = inpainted(STAGES[0], Image.fromarray(original), mask, guarded(), **told, safety="flag")
    assert flagged.nsfw_detected == [True, False]
    np.testing.assert_array_equal(pixels(flagged.full_size(), 0)[4:], own[4:])


def test_the_watermark_is_drawn_on_pictures_of_any_size_and_touches_nothing_else() -> None:
    watermarker = IFWatermarker()
    watermarker.watermark_image[:] = torch.tensor([255.0, 0.0, 0.0, 255.0])
    pipe = pipeline(STAGES[0], watermarker=watermarker)
    original, mask = given_as("pil", 200, 240, 0), np.zeros((200, 240), dtype=bool)
    mask[:50, :50] = True
    (full,) = inpainted(STAGES[0], Image.fromarray(original), mask, pipe, output_type="pil").full_size()
    changed = (np.asarray(full) != original).any(axis=2) & ~mask
    rows, columns = np.nonzero(changed)
    assert changed.any()
    assert rows.min() > 170
    assert columns.min() > 210


def test_an_output_without_given_pictures_says_so() -> None:
    with pytest.raises(ValueError, match="put_back"):
        IFInpaintingOutput([]).full_size()
    assert IFInpaintingOutput([1], [False], [False]).to_tuple() == IFPipelineOutput([1], [False], [False]).to_tuple()
