"""All seven pipelines are the incumbent's: the same picture, and generators that have drawn the same.

Every argument that decides what is painted or drawn is in some row of each pipeline. Ours runs as it does by default,
with all that makes it faster.
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.pipelines.compare import assert_same, call_both
from tests.pipelines.seven import SEVEN, STAGE_OF, built

from floyd.runtime.switches import Switches

PROMPTS = ["A red circle above the blue square!", "a cat"]
NEGATIVES = ["blue", "a dog on a large background"]
STEPS = 4
SIDES = (20, 28)

# what is asked of every pipeline; what one does not take is left out
ROWS: dict[str, dict[str, Any]] = {
    "two images of each of two prompts, four generators": {
        "prompt": PROMPTS,
        "negative_prompt": NEGATIVES,
        "num_images_per_prompt": 2,
        "seeds": [1, 2, 3, 4],
        "strength": 0.9,
    },
    "two prompts, a negative and a generator each": {
        "prompt": PROMPTS,
        "negative_prompt": NEGATIVES,
        "seeds": [3, 4],
        "strength": 1.0,
    },
    "two images of one prompt, one generator": {"prompt": PROMPTS[0], "num_images_per_prompt": 2},
    "a table of timesteps, another noise level": {
        "prompt": PROMPTS[1:],
        "timesteps": [960, 700, 333, 20, 0],
        "strength": 0.8,
        "noise_level": 40,
    },
    "no guidance, from PIL pictures": {"prompt": PROMPTS, "guidance_scale": 1.0, "of_pil": True, "strength": 0.5},
    "embeddings, another guidance": {"guidance_scale": 5.0, "of_embeddings": True},
}
ONLY_ONE_IMAGE_EACH = "StableDiffusionUpscalePipeline"  # the incumbent pairs pictures and prompts wrongly
CASES = [
    (name, row)
    for name in SEVEN
    for row, told in ROWS.items()
    if name != ONLY_ONE_IMAGE_EACH or not {"num_images_per_prompt", "timesteps"} & set(told)
]


def noisy(count: int, height: int, width: int, *, seed: int, as_pil: bool) -> Any:
    """So many pictures: tensors in [-1, 1], or PIL pictures."""
    pixels_BHWC = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    if as_pil:
        return [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_BHWC]
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2) / 127.5 - 1


def arguments_of(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row as this pipeline takes it."""
    told = {"output_type": "pt", "num_inference_steps": STEPS, **row}
    stage, as_pil = STAGE_OF[name], told.pop("of_pil", False)
    if told.pop("of_embeddings", False):
        told["prompt_embeds"], told["negative_prompt_embeds"] = tiny.embeds(1)
    count = len(told["prompt"]) if isinstance(told.get("prompt"), list) else 1
    height, width = (40, 52) if as_pil else SIDES  # PIL pictures are brought to the stage's size
    if "Img2Img" in name or "Inpainting" in name:
        told["image" if stage == "one" else "original_image"] = noisy(count, height, width, seed=1, as_pil=as_pil)
        told["num_inference_steps"] = round(STEPS / told.get("strength", 1.0))
    else:
        told.pop("strength", None)
        if stage != "three" and not as_pil:
            told |= {"height": height, "width": width}
    if "Inpainting" in name:
        mask_HW = np.zeros((height, width), dtype=np.uint8)
        mask_HW[4 : height // 2, 5 : width // 2] = 255
        told["mask_image"] = Image.fromarray(mask_HW) if as_pil else torch.from_numpy(mask_HW)[None, None] / 255
    if stage == "one":
        told.pop("noise_level", None)
    else:
        is_squashed = as_pil and name == "IFSuperResolutionPipeline"  # by the incumbent, unless it is square
        told["image"] = noisy(count, 16, 16 if is_squashed else 20, seed=2, as_pil=as_pil)
    return told


def incumbent(name: str, theirs: dict[str, Any]) -> Any:
    """The same components in the incumbent's class; stage II reads with the T5 of stage I."""
    parts = dict(theirs[STAGE_OF[name]].components)
    if STAGE_OF[name] == "two":
        parts |= {part: theirs["one"].components[part] for part in ("tokenizer", "text_encoder")}
    if name == ONLY_ONE_IMAGE_EACH:
        return theirs["three"]
    pipe = getattr(diffusers, name)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("name", "row"), CASES)
def test_every_pipeline_is_the_incumbents(ours: dict[str, Any], theirs: dict[str, Any], name: str, row: str) -> None:
    arguments = arguments_of(name, ROWS[row])
    mine_pipe = built(name, ours)
    mine, other = call_both(mine_pipe, incumbent(name, theirs), **arguments)
    assert mine_pipe.switches == Switches.best_for("cpu"), "whatever makes it faster is on"
    assert_same(mine.images, other.images)
