"""What a call may be told. What it may not is in test_bad_calls.py."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

import floyd
from floyd.pipelines.options import CallOptions, Options, StageOptions, check_noise_level, with_defaults

SMALL_PHOTO = torch.zeros(1, 3, 32, 32)
PIPELINES = [getattr(floyd, name) for name in floyd.__all__ if name.startswith("IF") and name.endswith("Pipeline")]
PIPELINES.append(floyd.StableDiffusionUpscalePipeline)


def test_a_prompt_without_a_text_encoder_says_so(ours: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="without its tokenizer"):
        ours["two"]("a cat", image=SMALL_PHOTO)


def test_editors_know_the_same_names() -> None:
    assert set(CallOptions.__annotations__) == {f.name for f in fields(Options)}


def test_every_stage_takes_only_names_that_editors_know() -> None:
    known = set(get_type_hints(StageOptions))
    taken = {name for kind in PIPELINES for name in inspect.signature(kind.__call__).parameters} - {"self"}
    assert taken == known


def test_a_misspelt_argument_is_named() -> None:
    def paint(prompt: str, steps: int = 3) -> None: ...

    assert with_defaults(paint, {"prompt": "a"}) == {"prompt": "a", "steps": 3}
    with pytest.raises(TypeError, match="does not take step; it takes prompt, steps"):
        with_defaults(paint, {"prompt": "a", "step": 1})


def test_a_callback_of_the_incumbents_says_itself_what_it_is_handed() -> None:
    class Cutoff:
        tensor_inputs = ("prompt_embeds",)

        def __call__(self, *told: Any) -> None: ...

    def options(callback: Any) -> Options:
        return Options(prompt="a", num_inference_steps=1, guidance_scale=1.0, callback_on_step_end=callback)

    assert options(Cutoff()).tensor_inputs == ("prompt_embeds",)
    assert options(print).tensor_inputs == ("latents",)
    Cutoff.tensor_inputs = ("timesteps",)
    with pytest.raises(ValueError, match="may hold x, latents, clean"):
        options(Cutoff())


def test_numbers_of_numpy_are_numbers() -> None:
    given: dict[str, Any] = {"num_inference_steps": np.int64(3), "guidance_scale": np.float32(2), "eta": np.float64(0)}
    assert Options(prompt="a", **given).num_inference_steps == 3
    assert check_noise_level(np.int32(7), 10) == 7
