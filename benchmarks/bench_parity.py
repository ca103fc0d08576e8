"""How far floyd's pictures are from diffusers': three tiny random stages chained, float32, one seed.

python benchmarks/bench_parity.py [--steps 4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import floyd
import tiny

PROMPT = "a large red circle above a small blue square"


def chain(stages: list[Any], steps: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Each stage's picture and the generator's state at the end, as the documented script chains them."""
    generator = torch.Generator().manual_seed(1)
    positive, negative = stages[0].encode_prompt(PROMPT)
    text = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    common = {"generator": generator, "num_inference_steps": steps}
    pictures = {"stage I": stages[0](**text, **common, output_type="pt").images}
    pictures["stage II"] = stages[1](image=pictures["stage I"], **text, **common, output_type="pt").images
    low_res = pictures["stage II"].clamp(-1, 1)
    last = stages[2](prompt=PROMPT, image=low_res, noise_level=100, **common, output_type="np").images
    pictures["stage III"] = torch.from_numpy(last)
    return pictures, generator.get_state()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args().steps
    theirs = [tiny.stage_one(), tiny.stage_two(), tiny.upscaler()]
    with tempfile.TemporaryDirectory() as folder:
        ours = []
        for i, stage in enumerate(theirs):
            stage.save_pretrained(f"{folder}/{i}")
            ours.append(floyd.DiffusionPipeline.from_pretrained(f"{folder}/{i}"))
        for stage in (*theirs, *ours):
            stage.set_progress_bar_config(disable=True)
        wanted, wanted_state = chain(theirs, steps)
        found, found_state = chain(ours, steps)
    figures: dict[str, Any] = {name: float((found[name] - wanted[name]).abs().max()) for name in wanted}
    figures["generator state equal"] = bool(torch.equal(found_state, wanted_state))
    for name, value in figures.items():
        print(f"{name:22} {value}")
    print(write("parity", {"steps": steps, "largest difference": figures}))


if __name__ == "__main__":
    main()
