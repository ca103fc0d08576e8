"""No bad call does any work, and none returns an empty picture in silence.

Every row is refused with a ValueError or a TypeError that names the argument, before a network is asked for anything,
before a text is read and before a random number is drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny

from floyd.pipelines.cascade import Cascade
from floyd.pipelines.deepfloyd_if import (
    IFImg2ImgPipeline,
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingPipeline,
    IFInpaintingSuperResolutionPipeline,
)

NAN, INF = float("nan"), float("inf")
POSITIVE, NEGATIVE = tiny.embeds()
PHOTO = Image.new("RGB", (40, 40), "red")
MASK = Image.new("L", (40, 40), 255)
SMALL = torch.zeros(1, 3, 32, 32)

IF = ("one", "variation", "inpainting", "two", "variation two", "inpainting two")
PIPELINES = (*IF, "three")
SECOND = ("two", "variation two", "inpainting two")

# A call of each that would be painted.
GOOD: dict[str, dict[str, Any]] = {
    "one": {"prompt": "a"},
    "variation": {"prompt": "a", "image": PHOTO},
    "inpainting": {"prompt": "a", "image": PHOTO, "mask_image": MASK},
    "two": {"prompt": "a", "image": SMALL},
    "variation two": {"prompt": "a", "image": SMALL, "original_image": PHOTO},
    "inpainting two": {"prompt": "a", "image": SMALL, "original_image": PHOTO, "mask_image": MASK},
    "three": {"prompt": "a", "image": SMALL},
    "cascade": {"prompt": "a"},
}


class Spied:
    """A component that may be asked for its configuration and for nothing else."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, component: Any = None, config: Any = None) -> None:
        self.config = component.config if config is None else config
        self.uses: list[str] = []

    def _used(self, *args: Any, **kwargs: Any) -> Any:
        self.uses.append("used")
        raise AssertionError("work was done before the call was refused")

    __call__ = read = step = encode = decode = scores = _used


def spied_over(loaded: dict[str, Any]) -> dict[str, Any]:
    """All pipelines and the cascade, over components that only look on."""
    parts = {name: dict(pipe.components) for name, pipe in loaded.items()}
    for name, component in parts["one"].items():
        if name in ("text_encoder", "tokenizer"):
            parts["two"][name] = component
    for components in parts.values():
        for name in ("unet", "text_encoder", "vae", "safety_checker"):
            if components.get(name) is not None:
                components[name] = Spied(components[name])
    one, two, three = (type(loaded[name])(**parts[name]) for name in ("one", "two", "three"))
    return {
        "one": one,
        "variation": IFImg2ImgPipeline(**parts["one"]),
        "inpainting": IFInpaintingPipeline(**parts["one"]),
        "two": two,
        "variation two": IFImg2ImgSuperResolutionPipeline(**parts["two"]),
        "inpainting two": IFInpaintingSuperResolutionPipeline(**parts["two"]),
        "three": three,
        "cascade": Cascade(one, two, three),
    }


@pytest.fixture(scope="module")
def spied(loaded: dict[str, Any]) -> dict[str, Any]:
    """One for all bad calls: none of them may leave a trace."""
    return spied_over(loaded)


def embeds(**change: Any) -> dict[str, Any]:
    """Embeddings instead of the prompt."""
    return {"prompt": None, "prompt_embeds": POSITIVE, "negative_prompt_embeds": NEGATIVE, **change}


class Elsewhere(torch.Generator):
    """As if it lay on an accelerator."""

    device = torch.device("cuda")  # type: ignore[assignment]


# which pipelines, which argument is wrong, how it is given (the value, or a dict of arguments), what the refusal says
Row = tuple[tuple[str, ...], str, Any, str]
TABLE: list[Row] = [
    # the prompt
    (PIPELINES, "prompt", None, "pass one of them"),
    (PIPELINES, "prompt", 5, "must be a str"),
    (PIPELINES, "prompt", b"a cat", "must be a str"),
    (PIPELINES, "prompt", [], "an empty list"),
    (PIPELINES, "prompt", ["a", None], "a list of NoneType and str"),
    (PIPELINES, "prompt", "a \ud83d", "surrogate"),
    (PIPELINES, "negative_prompt", 5, "must be a str"),
    (PIPELINES, "negative_prompt", [], "an empty list"),
    (PIPELINES, "negative_prompt", ["b", "c"], "2 texts for 1 prompts"),
    (PIPELINES, "negative_prompt", ["\udc00"], "surrogate"),
    # embeddings
    (PIPELINES, "prompt_embeds", {"prompt_embeds": POSITIVE}, "both given"),
    (PIPELINES, "prompt_embeds", embeds(prompt_embeds=[[0.0]]), "torch.Tensor"),
    (PIPELINES, "prompt_embeds", embeds(prompt_embeds=POSITIVE[0]), r"\[prompts, tokens, width\]"),
    (PIPELINES, "prompt_embeds", embeds(prompt_embeds=POSITIVE[:0]), "empty"),
    (PIPELINES, "prompt_embeds", embeds(prompt_embeds=POSITIVE[:, :0]), "empty"),
    (PIPELINES, "prompt_embeds", embeds(prompt_embeds=POSITIVE.long()), "floats"),
    (PIPELINES, "prompt_embeds", embeds(prompt_embeds=POSITIVE * NAN), "finite"),
    (PIPELINES, "prompt_embeds", embeds(prompt_embeds=POSITIVE[..., :8], negative_prompt_embeds=None), "reads 32"),
    (PIPELINES, "negative_prompt_embeds", embeds(negative_prompt_embeds=NEGATIVE[:, 1:]), "same shape"),
    (PIPELINES, "negative_prompt_embeds", embeds(negative_prompt="b"), "both given"),
    (PIPELINES, "negative_prompt_embeds", NEGATIVE, "16 tokens, but a prompt is read as 77"),
    (PIPELINES, "negative_prompt_embeds", NEGATIVE.repeat(2, 1, 1), "2 rows for 1 prompts"),
    (PIPELINES, "negative_prompt_embeds", NEGATIVE[..., :8], "8 wide"),
    # how many
    (PIPELINES, "num_images_per_prompt", 0, "positive int"),
    (PIPELINES, "num_images_per_prompt", -1, "positive int"),
    (PIPELINES, "num_images_per_prompt", 1.5, "positive int"),
    (PIPELINES, "num_images_per_prompt", None, "positive int"),
    # steps
    (PIPELINES, "num_inference_steps", 0, "positive int"),
    (PIPELINES, "num_inference_steps", -1, "positive int"),
    (PIPELINES, "num_inference_steps", 2.5, "positive int"),
    (PIPELINES, "num_inference_steps", True, "positive int"),
    (PIPELINES, "num_inference_steps", "ten", "positive int"),
    (PIPELINES, "num_inference_steps", None, "positive int"),
    (PIPELINES, "num_inference_steps", 1001, r"in \[1, 1000\]"),
    (IF, "timesteps", [], "at least one"),
    (IF, "timesteps", [0, 10], "descending"),
    (IF, "timesteps", [10, 10], "descending"),
    (IF, "timesteps", [1000, 0], r"in \[0, 1000\)"),
    (IF, "timesteps", [10, -1], r"in \[0, 1000\)"),
    (IF, "timesteps", [10.5, 0], "whole numbers"),
    (IF, "timesteps", [True, False], "whole numbers"),
    (IF, "timesteps", ["a"], "whole numbers"),
    (IF, "timesteps", 5, "whole numbers"),
    (IF, "timesteps", "fast28", "fast27"),
    (IF, "timesteps", "0,0", "at least one"),
    (IF, "timesteps", "2000", "asks for 2000"),
    # strength
    (("variation", "inpainting", "variation two", "inpainting two"), "strength", 0, r"in \(0, 1\]"),
    (("variation", "inpainting", "variation two", "inpainting two"), "strength", -0.1, r"in \(0, 1\]"),
    (("variation", "inpainting", "variation two", "inpainting two"), "strength", 1.5, r"in \(0, 1\]"),
    (("variation", "inpainting", "variation two", "inpainting two"), "strength", NAN, r"in \(0, 1\]"),
    (("variation", "inpainting", "variation two", "inpainting two"), "strength", "a", r"in \(0, 1\]"),
    (("variation", "inpainting", "variation two", "inpainting two"), "strength", None, r"in \(0, 1\]"),
    (("variation", "inpainting", "variation two", "inpainting two"), "strength", True, r"in \(0, 1\]"),
    (("variation", "inpainting", "variation two", "inpainting two"), "strength", 0.005, "leaves none of"),
    # guidance and eta
    (PIPELINES, "guidance_scale", NAN, "finite"),
    (PIPELINES, "guidance_scale", INF, "finite"),
    (PIPELINES, "guidance_scale", "high", "finite"),
    (PIPELINES, "guidance_scale", None, "finite"),
    (PIPELINES, "guidance_scale", True, "finite"),
    (PIPELINES, "guidance_interval", 500, "two whole timesteps"),
    (PIPELINES, "guidance_interval", [500], "two whole timesteps"),
    (PIPELINES, "guidance_interval", (0, 500, 1000), "two whole timesteps"),
    (PIPELINES, "guidance_interval", (0.2, 0.8), "two whole timesteps"),
    (PIPELINES, "guidance_interval", (False, True), "two whole timesteps"),
    (PIPELINES, "guidance_interval", (-1, 500), "0 <= low < high"),
    (PIPELINES, "guidance_interval", (500, 500), "0 <= low < high"),
    (PIPELINES, "guidance_interval", (700, 300), "0 <= low < high"),
    (PIPELINES, "guidance_interval", (0, 1001), "<= 1000"),
    (PIPELINES, "guidance_interval", "all", "two whole timesteps"),
    (PIPELINES, "eta", -0.1, r"in \[0, 1\]"),
    (PIPELINES, "eta", 1.5, r"in \[0, 1\]"),
    (PIPELINES, "eta", NAN, "finite"),
    (PIPELINES, "eta", "a", "finite"),
    # generators
    (PIPELINES, "generator", 5, "torch.Generator or a list"),
    (PIPELINES, "generator", ["a"], "torch.Generator or a list"),
    (PIPELINES, "generator", [], "0 generators for 1 images"),
    (PIPELINES, "generator", [torch.Generator(), torch.Generator()], "2 generators for 1 images"),
    (PIPELINES, "generator", Elsewhere(), "lies on cuda, the network on cpu"),
    (PIPELINES, "generator", [Elsewhere()], "lies on cuda"),
    # what comes out
    (PIPELINES, "output_type", "jpeg", "pil, np, pt"),
    (PIPELINES, "output_type", None, "pil, np, pt"),
    (IF, "output_type", "latent", "pil, np, pt"),
    (PIPELINES, "return_dict", "no", "True or False"),
    (IF, "clean_caption", "yes", "True or False"),
    (IF, "clean_caption", None, "True or False"),
    (PIPELINES, "safety", "off", "black, blur, flag, raise"),
    (PIPELINES, "safety", None, "black, blur, flag, raise"),
    (PIPELINES, "safety", False, "black, blur, flag, raise"),
    (("three",), "safety", "raise", "needs a safety_checker"),
    (PIPELINES, "batch_invariant", "yes", "True or False"),
    # callbacks
    (PIPELINES, "callback", 3, "callable with"),
    (PIPELINES, "callback_steps", 0, "positive int"),
    (PIPELINES, "callback_steps", None, "positive int"),
    (PIPELINES, "callback_on_step_end", "print", "callable with"),
    (PIPELINES, "callback_on_step_end_tensor_inputs", ["latent"], "x, latents, clean, prompt_embeds"),
    (PIPELINES, "callback_on_step_end_tensor_inputs", "x", "a list of names"),
    (PIPELINES, "callback_on_step_end_tensor_inputs", None, "a list of names"),
    (PIPELINES, "callback_on_step_end_tensor_inputs", ["x", "latents"], "two names of one tensor"),
    (PIPELINES, "cross_attention_kwargs", {"cross_attention_kwargs": {"gligen": {}}}, "gligen"),
    (PIPELINES, "cross_attention_kwargs", "scale", "must be a dict"),
    (PIPELINES, "cross_attention_kwargs", {"cross_attention_kwargs": {"scale": NAN}}, "finite"),
    # sizes
    (("one", "two"), "height", 0, r"in \[1, 4096\]"),
    (("one", "two"), "height", -8, r"in \[1, 4096\]"),
    (("one", "two"), "width", 32.5, r"in \[1, 4096\]"),
    (("one", "two"), "width", True, r"in \[1, 4096\]"),
    (("one", "two"), "width", "64", r"in \[1, 4096\]"),
    (("one", "two"), "height", 10**6, r"in \[1, 4096\]"),
    # pictures
    (("variation", "inpainting", *SECOND, "three"), "image", None, "missing"),
    (("variation", "inpainting", *SECOND, "three"), "image", [], "empty list"),
    (("variation", "inpainting", *SECOND, "three"), "image", "cat.png", "PIL pictures, numpy arrays or tensors"),
    (("variation", "inpainting", *SECOND, "three"), "image", [None], "PIL pictures, numpy arrays or tensors"),
    (("variation", "inpainting", *SECOND, "three"), "image", [PHOTO, PHOTO], "2 pictures for 1 prompts"),
    (("variation", "inpainting", *SECOND, "three"), "image", SMALL * NAN, r"in \[-1.0, 1.0\]"),
    (("variation", "inpainting", *SECOND, "three"), "image", SMALL + 100, r"in \[-1.0, 1.0\]"),
    (("variation", "inpainting", *SECOND, "three"), "image", SMALL.long(), "floats"),
    (("variation", "inpainting", *SECOND, "three"), "image", SMALL[:0], "empty"),
    (("variation", "inpainting", *SECOND, "three"), "image", SMALL[:, :2], "3 channels"),
    (("variation", "inpainting", *SECOND, "three"), "image", SMALL[0, 0], "C, H, W"),
    (("variation", "inpainting", *SECOND, "three"), "image", np.full((1, 32, 32, 3), -1.0), r"in \[0.0, 1.0\]"),
    (("variation", "inpainting", *SECOND, "three"), "image", np.zeros((32, 32, 3), np.int64), "floats"),
    (("variation", "inpainting", *SECOND, "three"), "image", [SMALL[0], SMALL[0, :, :16]], "one size"),
    (("variation", "inpainting", *SECOND, "three"), "image", Image.new("RGB", (0, 8)), "empty"),
    (("variation two", "inpainting two"), "original_image", None, "missing"),
    (("variation two", "inpainting two"), "original_image", 3, "PIL pictures"),
    (("variation two", "inpainting two"), "original_image", [PHOTO, PHOTO], "2 pictures for 1 prompts"),
    (("three",), "image", torch.zeros(1, 3, 1, 5000), r"in \[1, 4096\]"),
    (("variation", "inpainting"), "image", Image.new("L", (1, 10**6)), r"height of image at this stage.*\[1, 4096\]"),
    # masks
    (("inpainting", "inpainting two"), "mask_image", None, "missing"),
    (("inpainting", "inpainting two"), "mask_image", [], "empty list"),
    (("inpainting", "inpainting two"), "mask_image", 3, "PIL pictures"),
    (("inpainting", "inpainting two"), "mask_image", torch.zeros(8, 30), "same shape"),
    (("inpainting", "inpainting two"), "mask_image", torch.zeros(3, 40, 40), "3 pictures for 1 prompts"),
    (("inpainting", "inpainting two"), "mask_image", torch.zeros(1, 3, 40, 40), "one channel"),
    (("inpainting", "inpainting two"), "mask_image", torch.zeros(40), "one channel"),
    (("inpainting", "inpainting two"), "mask_image", torch.full((40, 40), 255.0), r"in \[0.0, 1.0\]"),
    (("inpainting", "inpainting two"), "mask_image", torch.full((40, 40), NAN), r"in \[0.0, 1.0\]"),
    (("inpainting", "inpainting two"), "mask_image", torch.ones(40, 40, dtype=torch.uint8), "0 and 1"),
    (("inpainting", "inpainting two"), "mask_image", torch.ones(40, 40, dtype=torch.long), "booleans"),
    (("inpainting", "inpainting two"), "mask_image", torch.zeros(0, 40, 40), "empty"),
    (("inpainting", "inpainting two"), "mask_image", Image.new("L", (8, 0)), "empty"),
    (("inpainting", "inpainting two"), "feather", -1, "number of pixels"),
    (("inpainting", "inpainting two"), "feather", 0.5, "number of pixels"),
    (("inpainting", "inpainting two"), "feather", "wide", "number of pixels"),
    (("inpainting", "inpainting two"), "feather", True, "number of pixels"),
    (("inpainting", "inpainting two"), "feather", 1000, "number of pixels"),
    (("inpainting", "inpainting two"), "resamples", 0, "resamples"),
    (("inpainting", "inpainting two"), "resamples", -1, "resamples"),
    (("inpainting", "inpainting two"), "resamples", "twice", "resamples"),
    (("inpainting", "inpainting two"), "resamples", True, "resamples"),
    (("inpainting", "inpainting two"), "resamples", 1.5, "resamples"),
    # noise levels
    (SECOND, "noise_level", 1000, r"in \[0, 1000\)"),
    (SECOND, "noise_level", -1, r"in \[0, 1000\)"),
    ((*SECOND, "three"), "noise_level", 0.25, "int in"),
    ((*SECOND, "three"), "noise_level", None, "int in"),
    ((*SECOND, "three"), "noise_level", True, "int in"),
    (("three",), "noise_level", 351, r"in \[0, 351\)"),
    (("three",), "noise_level", -1, r"in \[0, 351\)"),
    ((SECOND[0], "three"), "color_fix", 1, "True or False"),
    (("three",), "color_fix", None, "True or False"),
    # stage three alone
    (("three",), "latents", torch.zeros(1, 4, 8, 8), r"shape \[1, 4, 32, 32\]"),
    (("three",), "latents", [[0.0]], "tensor of floats"),
    (("three",), "latents", torch.zeros(1, 4, 32, 32).long(), "tensor of floats"),
    (("three",), "latents", torch.full((1, 4, 32, 32), NAN), "finite"),
    (("three",), "clip_skip", -1, r"in \[0, 3\]"),
    (("three",), "clip_skip", 4, r"in \[0, 3\]"),
    (("three",), "clip_skip", 1.0, "int or None"),
    # the chain
    (("cascade",), "prompt", None, "one str"),
    (("cascade",), "prompt", ["a", "b"], "one str"),
    (("cascade",), "prompt", "\ud800", "surrogate"),
    (("cascade",), "negative_prompt", ["a"], "one str"),
    (("cascade",), "size", 64, "32, 48"),
    (("cascade",), "size", "big", "32, 48"),
    (("cascade",), "seed", -1, "at least 0"),
    (("cascade",), "seed", 0.5, "at least 0"),
    (("cascade",), "seed", "a", "at least 0"),
    (("cascade",), "seed", True, "at least 0"),
    (("cascade",), "count", 0, "positive int"),
    (("cascade",), "count", 1.5, "positive int"),
    (("cascade",), "steps", 0, "positive int"),
    (("cascade",), "steps", True, "positive int"),
    (("cascade",), "steps", 2.5, "a number, a respacing string"),
    (("cascade",), "steps", {"steps": {"stage_1": 3}}, "a number, a respacing string"),
    (("cascade",), "steps", (1, 2), "one for each"),
    (("cascade",), "steps", ("fast28", 1, 1), "fast27"),
    (("cascade",), "guidance", "high", "finite"),
    (("cascade",), "guidance", (1.0, NAN, 1.0), "finite"),
    (("cascade",), "guidance_interval", (0, 1001), "<= 1000"),
    (("cascade",), "guidance_interval", [(0, 500), (0, 500)], "one for each"),
    (("cascade",), "guidance_interval", [(0, 500), None, 3], "two whole timesteps"),
    (("cascade",), "guidance_interval", "all", "two whole timesteps"),
    (("cascade",), "options", {"options": {"stage_4": {}}}, "stage_4"),
    (("cascade",), "options", ["stage_1"], "dict of dicts"),
    (("cascade",), "options", {"options": {"stage_1": 3}}, "dict of dicts"),
    (("cascade",), "noise", {"options": {"stage_2": {"noise": 1}}}, "does not take noise"),
    (("cascade",), "noise_level", {"options": {"stage_2": {"noise_level": 1000}}}, "noise_level of stage_2"),
    (("cascade",), "color_fix", {"options": {"stage_2": {"color_fix": "yes"}}}, "color_fix of stage_2"),
    (("cascade",), "eta", {"options": {"stage_3": {"eta": -1.0}}}, r"in \[0, 1\]"),
    (("cascade",), "clip_skip", {"options": {"stage_3": {"clip_skip": 9}}}, r"in \[0, 3\]"),
    (("cascade",), "image", {"options": {"stage_2": {"image": None}}}, "the cascade itself decides"),
    (("cascade",), "safety", "off", "black, blur, flag, raise"),
    (("cascade",), "clean_caption", "yes", "True or False"),
    (("cascade",), "free_text_encoder", 1, "True or False"),
    (("cascade",), "batch_invariant", "yes", "True or False"),
]
CALLS = [(stage, *row) for stages, *row in TABLE for stage in stages]


def shown(call: tuple[Any, ...]) -> str:
    stage, argument, value, _ = call
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return f"{stage}-{argument}-{ascii(text)[1:-1]}"


@pytest.mark.parametrize(("stage", "argument", "given", "says"), CALLS, ids=map(shown, CALLS))
def test_a_bad_call_is_refused_before_any_work(
    spied: dict[str, Any], stage: str, argument: str, given: Any, says: str
) -> None:
    arguments = {**GOOD[stage], **(given if isinstance(given, dict) else {argument: given})}
    if stage != "cascade":
        arguments.setdefault("generator", torch.Generator().manual_seed(0))
    generators = _generators(arguments.get("generator"))
    before = [generator.get_state() for generator in (*generators, torch.default_generator)]

    with pytest.raises((ValueError, TypeError), match=says) as refused:
        spied[stage](**arguments)

    named = "guidance_scale" if argument == "guidance" else argument
    assert named in str(refused.value), f"{refused.value} does not say which argument it is"
    after = [generator.get_state() for generator in (*generators, torch.default_generator)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "a random number was drawn"
    assert _uses(spied) == []


def test_the_table_is_large_and_holds_something_for_every_pipeline() -> None:
    assert len(TABLE) >= 100
    assert len({shown(call) for call in CALLS if call[0] != "cascade"}) >= 500
    assert {stage for stage, *_ in CALLS} == {*PIPELINES, "cascade"}


@pytest.mark.parametrize("stage", GOOD)
def test_the_same_call_without_its_fault_goes_to_work(loaded: dict[str, Any], stage: str) -> None:
    """Otherwise the table above would prove nothing."""
    spied = spied_over(loaded)
    with pytest.raises(AssertionError, match="work was done"):
        spied[stage](**GOOD[stage])
    assert _uses(spied) == ["used"]


def test_a_run_of_the_chain_is_refused_when_it_is_called_and_not_when_it_is_read(spied: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="count"):
        spied["cascade"].run("a", count=0)


def _generators(given: Any) -> list[torch.Generator]:
    listed = given if isinstance(given, list) else [given]
    return [generator for generator in listed if isinstance(generator, torch.Generator)]


def _uses(spied: dict[str, Any]) -> list[str]:
    pipelines = [pipe for name, pipe in spied.items() if name != "cascade"]
    spies = {id(part): part for pipe in pipelines for part in pipe.components.values() if isinstance(part, Spied)}
    return [use for spy in spies.values() for use in spy.uses]
