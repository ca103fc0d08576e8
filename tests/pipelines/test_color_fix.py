"""`color_fix`: the large picture has the coarse colours of the small one, whoever asks and however it is painted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.pipelines.seven import SEVEN, built, told

from floyd.images.colors import with_colors_of
from floyd.images.convert import to_unit
from floyd.pipelines.cascade import Cascade, StageDone, StepDone

ENLARGING = ("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline", "StableDiffusionUpscalePipeline")


@pytest.fixture
def unchecked(ours: dict[str, Any]) -> dict[str, Any]:
    for pipe in ours.values():
        pipe.safety_checker = pipe.feature_extractor = pipe.watermarker = None
    return ours


@pytest.mark.parametrize("name", ENLARGING)
def test_it_is_the_plain_picture_with_other_colours(unchecked: dict[str, Any], name: str) -> None:
    pipe = built(name, unchecked)
    arguments = told(name, 0, 1)
    *_, last = pipe.watch(pipe.task(**told(name, 0, 1)))
    plain_BCHW = pipe.decode(last.x_BCHW)
    wanted_BCHW = with_colors_of(arguments["image"], plain_BCHW)
    if name.startswith("Stable"):  # hands out [0, 1]
        plain_BCHW, wanted_BCHW = to_unit(plain_BCHW), to_unit(wanted_BCHW)
    assert torch.equal(pipe(**told(name, 0, 1)).images, plain_BCHW)
    assert torch.equal(pipe(**arguments, color_fix=True).images, wanted_BCHW)
    assert not torch.equal(wanted_BCHW, plain_BCHW)


@pytest.mark.parametrize("name", ENLARGING)
def test_an_image_is_the_same_in_a_batch(unchecked: dict[str, Any], name: str) -> None:
    pipe = built(name, unchecked)
    both_BCHW = pipe(**told(name, 0, 1), color_fix=True, batch_invariant=True).images
    alone_BCHW = pipe(**told(name, 1), color_fix=True, batch_invariant=True).images
    assert torch.equal(both_BCHW[1:], alone_BCHW)


@pytest.mark.parametrize("name", sorted(set(SEVEN) - set(ENLARGING)))
def test_others_do_not_take_it(unchecked: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match="color_fix"):
        built(name, unchecked)(**told(name, 0), color_fix=True)


def test_latents_have_no_colours(unchecked: dict[str, Any]) -> None:
    pipe = built("StableDiffusionUpscalePipeline", unchecked)
    arguments = told("StableDiffusionUpscalePipeline", 0) | {"output_type": "latent"}
    with pytest.raises(ValueError, match="color_fix"):
        pipe(**arguments, color_fix=True)


def test_a_cascade_fixes_every_stage_and_its_previews(unchecked: dict[str, Any]) -> None:
    few = {"num_inference_steps": 2}
    fixed = {**few, "color_fix": True}
    plain = Cascade(*unchecked.values(), presets={"stage_1": few, "stage_2": few, "stage_3": few})
    fixing = Cascade(*unchecked.values(), presets={"stage_1": few, "stage_2": fixed, "stage_3": fixed})
    far, near = _distances(plain), _distances(fixing)
    assert far.keys() == near.keys() == {"stage_2", "stage_2 preview", "stage_3", "stage_3 preview"}
    for name in far:
        assert near[name] < 0.5 * far[name], name


def _distances(cascade: Cascade) -> dict[str, float]:
    """How far the coarse colours of a stage's picture, and of the last preview, are from those of the stage before."""
    found: dict[str, float] = {}
    before: Any = None
    preview: Any = None
    for event in cascade.run("a red circle", size=192, seed=3):
        if isinstance(event, StepDone):
            preview = _coarse(event.preview()[0])
        if isinstance(event, StageDone):
            own = _coarse(event.pictures[0])
            if before is not None:
                found |= {
                    event.stage: float(np.abs(own - before).mean()),
                    f"{event.stage} preview": float(np.abs(preview - before).mean()),
                }
            before = own
    return found


def _coarse(picture: Any) -> np.ndarray:
    return np.asarray(picture.resize((2, 2), Image.Resampling.BOX)).astype(float)
