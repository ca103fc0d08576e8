"""Bad calls are refused with a message that says what to do, and before any work is done."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny

from floyd.pipelines.deepfloyd_if import (
    IFImg2ImgPipeline,
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingPipeline,
    IFInpaintingSuperResolutionPipeline,
)
from floyd.pipelines.options import CallOptions, Options, StageOptions, with_defaults

POSITIVE, NEGATIVE = tiny.embeds()
PHOTO = Image.new("RGB", (40, 40), "red")
SMALL_PHOTO = torch.zeros(1, 3, 32, 32)


class Bomb:
    """A network that must not be asked for anything but its configuration."""

    dtype = torch.float32

    def __init__(self, config: Any = None) -> None:
        self.config = config

    def read(self, *args: Any) -> Any:
        raise AssertionError("work was done before the call was refused")

    __call__ = step = read


@pytest.fixture
def armed(ours: dict[str, Any]) -> dict[str, Any]:
    """All stages, with networks that go off when used."""
    for pipe in ours.values():
        pipe.unet = Bomb(pipe.unet.config)
        pipe.text_encoder = Bomb()
    one, two = ours["one"].components, ours["two"].components
    return {
        **ours,
        "variation": IFImg2ImgPipeline(**one),
        "inpainting": IFInpaintingPipeline(**one),
        "variation two": IFImg2ImgSuperResolutionPipeline(**two),
        "inpainting two": IFInpaintingSuperResolutionPipeline(**two),
    }


LOW: dict[str, Any] = {"prompt_embeds": POSITIVE, "negative_prompt_embeds": NEGATIVE, "image": SMALL_PHOTO}
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("one", {}, ValueError, "pass one of them"),
    ("one", {"prompt": "a", "prompt_embeds": POSITIVE}, ValueError, "both given"),
    ("one", {"prompt": 5}, ValueError, "prompt must be a str"),
    ("one", {"prompt": []}, ValueError, "non-empty list"),
    ("one", {"prompt": "a", "negative_prompt": 5}, TypeError, "negative_prompt must be"),
    ("one", {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": NEGATIVE}, ValueError, "both given"),
    ("one", {"prompt_embeds": POSITIVE, "negative_prompt_embeds": NEGATIVE[:, 1:]}, ValueError, "same shape"),
    ("one", {"prompt": ["a", "b"], "negative_prompt": ["c", "d", "e"]}, ValueError, "negative"),
    ("one", {"prompt": "a", "callback_steps": 0}, ValueError, "callback_steps must be a positive int"),
    ("one", {"prompt": "a", "callback_steps": None}, ValueError, "callback_steps must be a positive int"),
    ("one", {"prompt": "a", "callback": 3}, TypeError, "callback must be callable"),
    ("one", {"prompt": "a", "num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
    ("one", {"prompt": "a", "num_inference_steps": 0}, ValueError, r"in \[1, 1000\]"),
    ("one", {"prompt": "a", "num_inference_steps": 1001}, ValueError, r"in \[1, 1000\]"),
    ("one", {"prompt": "a", "timesteps": [0, 10]}, ValueError, "descending"),
    ("one", {"prompt": "a", "timesteps": []}, ValueError, "at least one"),
    ("one", {"prompt": "a", "timesteps": "fast28"}, ValueError, "fast27"),
    ("one", {"prompt": "a", "guidance_scale": float("nan")}, ValueError, "finite"),
    ("one", {"prompt": "a", "guidance_scale": None}, ValueError, "finite"),
    ("one", {"prompt": "a", "output_type": "jpeg"}, ValueError, "pil, np, pt, got 'jpeg'"),
    ("one", {"prompt": "a", "output_type": "latent"}, ValueError, "output_type"),
    ("one", {"prompt": "a", "height": 31}, ValueError, "height must be a multiple of 2.*30 or 32"),
    ("one", {"prompt": "a", "width": 0}, ValueError, "width must be a positive int"),
    ("one", {"prompt": "a", "generator": 5}, TypeError, "torch.Generator or a list"),
    ("one", {"prompt": "a", "generator": [torch.Generator()] * 2}, ValueError, "2 generators for 1 images"),
    ("one", {"prompt": "a", "cross_attention_kwargs": {"gligen": {}}}, ValueError, "gligen"),
    ("two", {**LOW, "image": None}, ValueError, "image is missing"),
    ("two", {**LOW, "image": []}, ValueError, "empty list"),
    ("two", {**LOW, "image": "cat.png"}, TypeError, "image must be PIL pictures"),
    ("two", {**LOW, "image": torch.zeros(2, 3, 32, 32)}, ValueError, "2 pictures for 1 prompts"),
    ("two", {**LOW, "image": torch.zeros(1, 4, 32, 32)}, ValueError, "3 channels"),
    ("two", {**LOW, "image": -np.ones((1, 32, 32, 3))}, ValueError, r"\[0.0, 1.0\]"),
    ("two", {**LOW, "image": [torch.zeros(3, 32, 32), torch.zeros(3, 16, 16)]}, ValueError, "one size"),
    ("two", {**LOW, "noise_level": 1000}, ValueError, r"noise_level must be an int in \[0, 1000\), got 1000"),
    ("two", {**LOW, "noise_level": -1}, ValueError, "noise_level"),
    ("two", {**LOW, "noise_level": 0.25}, ValueError, "noise_level"),
    ("two", {**LOW, "width": 33}, ValueError, "width must be a multiple"),
    ("variation", {"prompt": "a"}, ValueError, "image is missing"),
    ("variation", {"prompt": "a", "image": PHOTO, "strength": 0.0}, ValueError, r"strength must be in \(0, 1\]"),
    ("variation", {"prompt": "a", "image": PHOTO, "strength": 1.5}, ValueError, r"strength must be in \(0, 1\]"),
    ("variation", {"prompt": "a", "image": PHOTO, "strength": 0.01}, ValueError, "leaves none of 80 steps"),
    ("variation", {"prompt": ["a", "b"], "image": PHOTO}, ValueError, "1 pictures for 2 prompts"),
    ("variation", {"prompt": "a", "image": torch.zeros(3, 31, 32)}, ValueError, "height must be a multiple of 2"),
    ("inpainting", {"prompt": "a", "image": PHOTO}, ValueError, "mask_image is missing"),
    ("inpainting", {"prompt": "a", "image": PHOTO, "mask_image": torch.zeros(8, 8)}, ValueError, "same shape"),
    ("inpainting", {"prompt": "a", "image": PHOTO, "mask_image": 3}, TypeError, "mask_image"),
    ("variation two", {**LOW}, ValueError, "original_image is missing"),
    ("variation two", {**LOW, "original_image": PHOTO, "noise_level": 1000}, ValueError, "noise_level"),
    ("inpainting two", {**LOW, "original_image": PHOTO, "mask_image": PHOTO, "noise_level": -1}, ValueError, "noise"),
    ("three", {**LOW, "image": None}, ValueError, "image is missing"),
    ("three", {**LOW, "noise_level": 351}, ValueError, r"\[0, 351\)"),
    ("three", {**LOW, "noise_level": -1}, ValueError, "noise_level"),
    ("three", {**LOW, "latents": torch.zeros(1, 4, 8, 8)}, ValueError, r"latents must have the shape \[1, 4, 32, 32\]"),
    ("three", {**LOW, "image": torch.zeros(1, 3, 3, 3)}, ValueError, "at least 4 px"),
    ("three", {**LOW, "output_type": "jpeg"}, ValueError, "latent, got 'jpeg'"),
]


@pytest.mark.parametrize(("stage", "arguments", "error", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_call_is_refused_before_any_work(
    armed: dict[str, Any], stage: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        armed[stage](**arguments)


def test_a_prompt_without_a_text_encoder_says_so(ours: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="without its tokenizer"):
        ours["two"]("a cat", image=SMALL_PHOTO)


def test_editors_know_the_same_names() -> None:
    assert set(CallOptions.__annotations__) == {f.name for f in fields(Options)}


def test_every_stage_takes_only_names_that_editors_know(armed: dict[str, Any]) -> None:
    import inspect

    known = set(get_type_hints(StageOptions))
    taken: set[str] = set()
    for pipe in armed.values():
        taken |= set(inspect.signature(pipe.__call__).parameters)
    assert taken == known


def test_a_misspelt_argument_is_named() -> None:
    def paint(prompt: str, steps: int = 3) -> None: ...

    assert with_defaults(paint, {"prompt": "a"}) == {"prompt": "a", "steps": 3}
    with pytest.raises(TypeError, match="does not take step; it takes prompt, steps"):
        with_defaults(paint, {"prompt": "a", "step": 1})


def test_a_bomb_goes_off(armed: dict[str, Any]) -> None:
    """Otherwise the table above would prove nothing."""
    with pytest.raises(AssertionError, match="work was done"):
        armed["one"](prompt_embeds=POSITIVE, negative_prompt_embeds=NEGATIVE)
    armed["one"].text_encoder = SimpleNamespace(dtype=torch.float32)
    with pytest.raises((AttributeError, TypeError)):
        armed["one"]("a cat")
