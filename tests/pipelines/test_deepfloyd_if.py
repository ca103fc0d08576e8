"""The six pipelines of IF against the incumbent's, and what they do better."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests import tiny
from tests.pipelines.compare import assert_same, call_both, quietly

import floyd.pipelines.deepfloyd_if as family
from floyd import DDPMScheduler
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline

PROMPT = "A red circle above the blue square!"
CLASSES = [getattr(family, name) for name in family.__all__ if name.endswith("Pipeline")]


def told_by_place(function: Any) -> list[tuple[str, Any]]:
    """Names and defaults, without those that stand behind the star: they are ours."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY]


@pytest.mark.parametrize("cls", [*CLASSES, StableDiffusionUpscalePipeline], ids=lambda cls: cls.__name__)
def test_a_call_takes_the_incumbents_arguments_in_the_same_order_with_the_same_defaults(cls: type) -> None:
    assert told_by_place(cls.__call__) == told_by_place(getattr(diffusers, cls.__name__).__call__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_constructor_and_encode_prompt_have_the_incumbents_signatures(cls: type) -> None:
    other = getattr(diffusers, cls.__name__)
    for name in ("__init__", "encode_prompt"):
        assert told_by_place(getattr(cls, name)) == told_by_place(getattr(other, name))


@pytest.mark.parametrize("name", [name for name in family.__all__ if name.endswith("_timesteps")])
def test_the_tables_are_the_incumbents_lists(name: str) -> None:
    import diffusers.pipelines.deepfloyd_if as other

    assert getattr(family, name) == getattr(other, name)
    assert isinstance(getattr(family, name), list)


def test_three_stages_with_one_generator_are_the_incumbents(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    def chain(stages: dict[str, Any]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        shared: dict[str, Any] = {"num_inference_steps": 4, "generator": generator, "output_type": "pt"}
        positive, negative = stages["one"].encode_prompt(PROMPT)
        text = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        first = stages["one"](**text, **shared).images
        second = stages["two"](image=first, **text, **shared).images
        third = stages["three"](prompt=PROMPT, image=second, noise_level=100, **shared).images
        return [positive, negative, first, second, third, generator.get_state()]

    with quietly():
        other = chain(theirs)
    mine = chain(ours)
    for a, b in zip(mine[:5], other[:5], strict=True):
        assert_same(a, b)
    assert torch.equal(mine[5], other[5])


# what tests/pipelines/test_parity.py does not ask of every pipeline
STAGE_ONE_CALLS: dict[str, dict[str, Any]] = {
    "its own size": {"prompt": PROMPT},
    "the caption as it is": {"prompt": "Two cats, see http://example.com/cat.png", "clean_caption": False},
    "an array": {"prompt": PROMPT, "output_type": "np"},
    "pictures, marked": {"prompt": PROMPT, "output_type": "pil"},
}


@pytest.mark.parametrize("arguments", STAGE_ONE_CALLS.values(), ids=STAGE_ONE_CALLS)
def test_stage_one_is_the_incumbents(ours: dict[str, Any], theirs: dict[str, Any], arguments: dict[str, Any]) -> None:
    given = {"num_inference_steps": 2, "output_type": "pt", **arguments}
    mine, other = call_both(ours["one"], theirs["one"], **given)
    assert_same(mine.images, other.images)


STAGE_TWO_CALLS: dict[str, dict[str, Any]] = {
    "its own size": {"noise_level": 0},
    "pictures": {"output_type": "pil"},
}


@pytest.mark.parametrize("arguments", STAGE_TWO_CALLS.values(), ids=STAGE_TWO_CALLS)
def test_stage_two_is_the_incumbents(ours: dict[str, Any], theirs: dict[str, Any], arguments: dict[str, Any]) -> None:
    positive, negative = tiny.embeds()
    given = {
        "image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1,
        "prompt_embeds": positive,
        "negative_prompt_embeds": negative,
        "num_inference_steps": 2,
        "output_type": "pt",
        **arguments,
    }
    mine, other = call_both(ours["two"], theirs["two"], **given)
    assert_same(mine.images, other.images)


def test_fixed_variance_ignores_the_learned_one_as_the_incumbent_does(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    mine_pipe, other_pipe = ours["one"], type(theirs["one"])(**theirs["one"].components, requires_safety_checker=False)
    other_pipe.set_progress_bar_config(disable=True)
    mine_pipe.scheduler = DDPMScheduler.from_config(mine_pipe.scheduler.config, variance_type="fixed_small")
    other_pipe.scheduler = diffusers.DDPMScheduler.from_config(other_pipe.scheduler.config, variance_type="fixed_small")
    mine, other = call_both(mine_pipe, other_pipe, prompt=PROMPT, num_inference_steps=3, output_type="pt")
    assert_same(mine.images, other.images)


def test_an_image_does_not_depend_on_its_neighbours(ours: dict[str, Any]) -> None:
    def paint(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        picture: torch.Tensor = ours["one"](prompts, 2, generator=generators, output_type="pt").images
        return picture

    together = paint([PROMPT, "a cat"], [3, 4])
    torch.testing.assert_close(paint(["a cat"], [4])[0], together[1], atol=1e-4, rtol=0)


def test_a_tuple_holds_what_the_output_holds(ours: dict[str, Any]) -> None:
    def paint(return_dict: bool) -> Any:
        generator = torch.Generator().manual_seed(0)
        return ours["one"](PROMPT, 1, generator=generator, output_type="np", return_dict=return_dict)

    images, nsfw, watermarked = paint(return_dict=False)
    output = paint(return_dict=True)
    np.testing.assert_array_equal(images, output.images)
    assert nsfw == output.nsfw_detected == [False]
    assert watermarked == output.watermark_detected == [False]


def test_encoding_first_and_calling_later_is_the_same_picture(ours: dict[str, Any]) -> None:
    pipe = ours["one"]
    positive, negative = pipe.encode_prompt(PROMPT, clean_caption=True)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    at_once = pipe(PROMPT, 2, generator=generators[0], output_type="pt").images
    pipe.text_encoder = pipe.tokenizer = None
    later = pipe(
        prompt_embeds=positive, negative_prompt_embeds=negative, num_inference_steps=2, generator=generators[1],
        output_type="pt",
    ).images  # fmt: skip
    assert torch.equal(at_once, later)


def test_one_negative_text_serves_a_batch_of_embeddings(ours: dict[str, Any]) -> None:
    positive, _ = ours["one"].encode_prompt([PROMPT, "a cat"])
    images = ours["one"](prompt_embeds=positive, negative_prompt="blue", num_inference_steps=1, output_type="pt").images
    assert images.shape[0] == 2


def test_sharing_components_is_safe_while_calls_interleave(ours: dict[str, Any]) -> None:
    """The incumbent's schedulers hold the state of a call; two calls at once ruin each other."""
    pipe = ours["one"]

    def tasks() -> list[Any]:
        seeded = ((steps, torch.Generator().manual_seed(steps)) for steps in (2, 3))
        return [pipe.task(prompt=PROMPT, num_inference_steps=n, generator=generator) for n, generator in seeded]

    quiet = [list(pipe.watch(task))[-1].x_BCHW for task in tasks()]
    moves = [pipe.watch(task) for task in tasks()]
    last: list[Any] = [None, None]
    for turn in (1, 0, 1, 0, 1):
        last[turn] = next(moves[turn]).x_BCHW
    for interleaved, alone in zip(last, quiet, strict=True):
        assert torch.equal(interleaved, alone)
