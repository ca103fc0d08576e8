"""The built-in cascade from a prompt to 1024 px, beside the same three stages in diffusers.

    python benchmarks/bench_cascade.py [--rounds 3] [--clock cpu] [--only diffusers floyd]

The same weights, steps, samplers and seeds, those of the checkpoint's presets, float32; warm: loading, compiling and a
first picture do not count, reading the prompt does. A stage ends when its pictures are there, stage III after decoding.

levels  the largest difference to diffusers' 1024 px picture, of 255
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import torch
from common import CLOCKS, in_turns, ratios, summary, write
from pairs import BUILT_IN

from floyd.diffusion.timesteps import TABLES
from floyd.errors import EngineError
from floyd.pipelines.cascade import Cascade, StageDone
from floyd.pipelines.run import stage_seed

PROMPT = "a large red circle above a small blue square on a white background"
PARTS = ("stage I", "stage II", "stage III")
WAYS = {"floyd": "auto", "floyd torch": None, "floyd openvino": "openvino"}  # the first as it is unless told otherwise
MOST_LEVELS = 16  # one number of millions; rounding adds up over 66 steps

Painted = tuple[np.ndarray, list[float]]  # the picture, and seconds of each stage


def incumbent(clock: str, presets: dict[str, dict[str, Any]]) -> Callable[[], Painted]:
    kinds = (diffusers.IFPipeline, diffusers.IFSuperResolutionPipeline, diffusers.StableDiffusionUpscalePipeline)
    stages = [kind.from_pretrained(BUILT_IN[f"mini-{i}"], dtype=torch.float32) for i, kind in enumerate(kinds, 1)]
    for stage in stages:
        stage.set_progress_bar_config(disable=True)
    now, told = CLOCKS[clock], [_told(presets[f"stage_{i}"]) for i in (1, 2, 3)]

    def paint() -> Painted:
        own = [{"generator": torch.Generator().manual_seed(stage_seed(0, f"stage_{i}"))} for i in (1, 2, 3)]
        moments = [now()]
        positive, negative = stages[0].encode_prompt(PROMPT)
        text = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "output_type": "pt"}
        x_BCHW = stages[0](**text, **told[0], **own[0]).images
        moments.append(now())
        x_BCHW = stages[1](image=x_BCHW, **text, **told[1], **own[1]).images
        moments.append(now())
        picture = stages[2](prompt=PROMPT, image=x_BCHW, **told[2], **own[2]).images[0]
        moments.append(now())
        return np.asarray(picture), [end - begin for begin, end in pairwise(moments)]

    return paint


def _told(preset: dict[str, Any]) -> dict[str, Any]:
    """A preset as diffusers takes it: tables by their numbers."""
    named = preset.get("timesteps")
    return preset if named is None else {**preset, "timesteps": list(TABLES[named])}


def built_in() -> Cascade:
    """Without what diffusers has not."""
    cascade = Cascade.built_in()
    for preset in cascade.presets.values():
        preset.pop("color_fix", None)
    return cascade


def ours(clock: str, engine: str | None) -> Callable[[], Painted]:
    cascade, now = built_in(), CLOCKS[clock]
    for stage in cascade.stages.values():
        stage.set_progress_bar_config(disable=True)
    cascade.use_engine(engine)

    def paint() -> Painted:
        moments = [now()]
        pictures = []
        for event in cascade.run(PROMPT, seed=0):
            if isinstance(event, StageDone):
                pictures.append(event.pictures[0])
                moments.append(now())
        return np.asarray(pictures[-1]), [end - begin for begin, end in pairwise(moments)]

    return paint


def measured(only: list[str], rounds: int, clock: str) -> dict[str, Any]:
    painters: dict[str, Callable[[], Painted]] = {"diffusers": incumbent(clock, built_in().presets)}
    for name, engine in WAYS.items():
        try:
            if not only or name in only:
                painters[name] = ours(clock, engine)
        except EngineError as error:
            print(f"{name} is left out: {error}")
    painted: dict[str, list[Painted]] = {name: [] for name in painters}
    works = {name: lambda name=name, paint=paint: painted[name].append(paint()) for name, paint in painters.items()}
    seconds = in_turns(works, rounds, clock)
    faster, (expected, _) = ratios(seconds, to="diffusers"), painted["diffusers"][0]
    rows = {}
    for name in works:
        levels = int(np.abs(painted[name][0][0].astype(int) - expected.astype(int)).max())
        if levels > MOST_LEVELS:
            raise SystemExit(f"{name} does not paint the same: {levels} of 255 levels apart.")
        parts = zip(*(parts for _, parts in painted[name][1:]), strict=True)
        rows[name] = {
            "ratio": faster[name],
            "levels": levels,
            "parts": dict(zip(PARTS, map(statistics.median, parts), strict=True)),
            **summary(seconds[name]),
        }
        told = "  ".join(f"{part} {own:.2f}" for part, own in rows[name]["parts"].items())
        print(f"{name:16} {rows[name]['ratio']:6.2f}x {rows[name]['median']:7.2f} s   {told}   levels {levels}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--only", nargs="*", default=[], help="of floyd's rows, those named")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the incumbent's, of its own documented use
        rows = measured(options.only, options.rounds, options.clock)
    print(write("cascade", {"threads": torch.get_num_threads(), "clock": options.clock, "rows": rows}))


if __name__ == "__main__":
    main()
