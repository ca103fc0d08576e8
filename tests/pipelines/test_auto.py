"""One set of networks, many pipelines: of the three of a stage, each is built over the others' components."""

from __future__ import annotations

import inspect
import logging
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.hub_cache import STAGE_ONE, STAGE_THREE, STAGE_TWO
from tests.hub_configs import SIDES

from floyd.pipelines.auto import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.deepfloyd_if import (
    IFImg2ImgPipeline,
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingPipeline,
    IFInpaintingSuperResolutionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
)
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
from floyd.runtime.placement import OneAtATime

ONE = (IFPipeline, IFImg2ImgPipeline, IFInpaintingPipeline)
TWO = (IFSuperResolutionPipeline, IFImg2ImgSuperResolutionPipeline, IFInpaintingSuperResolutionPipeline)
AUTO = (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting)
XL, L = STAGE_ONE[0], STAGE_TWO[0]


@pytest.fixture
def stages(published: Path) -> dict[str, Any]:
    """Stages I and II, loaded as what their checkpoints name."""
    pipes = {"one": DiffusionPipeline.from_pretrained(XL), "two": DiffusionPipeline.from_pretrained(L)}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


def paint(pipe: Any) -> torch.Tensor:
    """Two steps of whatever task it is, of a picture and a mask where it takes them."""
    small, large = SIDES["stage_1"], SIDES["stage_2"]
    pixels = np.random.default_rng(0).integers(0, 256, (large, large, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    given: dict[str, Any] = {"image": photo, "original_image": photo, "mask_image": photo.convert("L")}
    if isinstance(pipe, TWO):
        given["image"] = photo.resize((small, small))
    taken = {name: given[name] for name in given if name in inspect.signature(pipe.__call__).parameters}
    generator = torch.Generator().manual_seed(0)
    out = pipe(prompt="a photo", num_inference_steps=4, generator=generator, output_type="pt", **taken)
    images: torch.Tensor = out.images
    return images


@pytest.mark.parametrize(("source", "target"), [*permutations(ONE, 2), *permutations(TWO, 2)], ids=lambda c: c.__name__)
def test_each_of_a_stages_three_is_built_from_the_components_of_each_other(
    stages: dict[str, Any], source: Any, target: Any
) -> None:
    first = source(**stages["one" if source in ONE else "two"].components)
    second = target(**first.components)
    assert type(second) is target
    assert list(second.components) == list(first.components)
    assert all(second.components[name] is part for name, part in first.components.items())


@pytest.mark.parametrize("kind", [*ONE, *TWO], ids=lambda c: c.__name__)
def test_a_converted_pipeline_paints_what_a_loaded_one_paints(stages: dict[str, Any], kind: Any) -> None:
    loaded = kind.from_pretrained(XL if kind in ONE else L)
    loaded.set_progress_bar_config(disable=True)
    converted = kind.from_pipe(stages["one" if kind in ONE else "two"])
    picture = paint(converted)
    assert torch.equal(picture, paint(loaded))
    assert picture.isfinite().all()
    assert picture.std() > 0.05


@pytest.mark.parametrize(("auto", "one", "two"), list(zip(AUTO, ONE, TWO, strict=True)))
def test_the_checkpoint_decides_the_stage_and_the_name_the_task(published: Path, auto: Any, one: Any, two: Any) -> None:
    none = {"unet": None, "text_encoder": None, "safety_checker": None}
    assert type(auto.from_pretrained(XL, **none, requires_safety_checker=False)) is one
    assert type(auto.from_pretrained(L, variant="fp16", torch_dtype=torch.float16)) is two


@pytest.mark.parametrize(("auto", "one", "two"), list(zip(AUTO, ONE, TWO, strict=True)))
def test_a_pipeline_at_hand_becomes_one_for_the_task_over_the_same_networks(
    stages: dict[str, Any], auto: Any, one: Any, two: Any
) -> None:
    for pipe, kind in ((stages["one"], one), (stages["two"], two)):
        other = auto.from_pipe(pipe)
        assert type(other) is kind
        assert all(other.components[name] is part for name, part in pipe.components.items())
        assert type(AutoPipelineForText2Image.from_pipe(other)) is type(pipe)


def test_what_was_set_on_a_pipeline_comes_along(published: Path) -> None:
    pipe = IFPipeline.from_pretrained(XL, text_encoder=None, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe._place(OneAtATime(torch.device("cpu")))
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert other.config.requires_safety_checker is False
    assert other.name_or_path == XL
    assert other._placement is pipe._placement
    assert other._progress_bar == {"disable": True}


def test_sharing_casts_nothing(published: Path) -> None:
    half = IFPipeline.from_pretrained(XL, variant="fp16", torch_dtype=torch.float16, text_encoder=None)
    other = IFImg2ImgPipeline.from_pipe(half)
    assert half.dtype == other.dtype == other.unet.dtype == torch.float16


def test_a_given_component_takes_the_place_of_the_shared_one(stages: dict[str, Any]) -> None:
    other = AutoPipelineForInpainting.from_pipe(stages["one"], text_encoder=None)
    assert other.text_encoder is None
    assert other.unet is stages["one"].unet
    assert stages["one"].text_encoder is not None
    second = IFSuperResolutionPipeline.from_pipe(stages["two"], watermarker=stages["one"].watermarker)
    assert second.watermarker is stages["one"].watermarker


def test_a_pipeline_of_another_stage_is_refused_with_what_it_lacks(stages: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs image_noising_scheduler, which a IFPipeline does not have"):
        IFSuperResolutionPipeline.from_pipe(stages["one"])
    with pytest.raises(ValueError, match="needs vae, low_res_scheduler"):
        StableDiffusionUpscalePipeline.from_pipe(stages["two"])
    with pytest.raises(TypeError, match="takes a pipeline, got a str"):
        IFImg2ImgPipeline.from_pipe(XL)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="does not take unett; it takes"):
        AutoPipelineForText2Image.from_pipe(stages["one"], unett=None)


def test_the_upscaler_is_no_stage_of_if(published: Path) -> None:
    with pytest.raises(ValueError, match="a StableDiffusionUpscalePipeline is neither"):
        AutoPipelineForImage2Image.from_pretrained(STAGE_THREE[0])


def test_an_auto_class_is_never_built_itself() -> None:
    for auto in AUTO:
        with pytest.raises(TypeError, match="use from_pretrained"):
            auto()


def test_any_class_of_a_stage_may_be_in_the_index(stages: dict[str, Any], tmp_path: Path) -> None:
    IFInpaintingPipeline.from_pipe(stages["one"], text_encoder=None, tokenizer=None).save_pretrained(tmp_path)
    assert type(AutoPipelineForText2Image.from_pretrained(tmp_path)) is IFPipeline


def test_sharing_is_silent(stages: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        AutoPipelineForImage2Image.from_pipe(stages["one"])
    assert caplog.text == ""
