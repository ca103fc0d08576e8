"""One forward pass, and a whole guided stage I, beside diffusers: the same weights, seed and steps, float32.

    python benchmarks/bench_forward.py [--size mini if-i-m] [--rounds 9] [--steps 10] [--compile] [--clock cpu]

Each is done in turns, after a check that both sides compute the same. `--compile` adds diffusers with torch.compile
and `pipe.compile()`; they take minutes to begin. Results of other sizes stay in the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import CLOCKS, figures_so_far, in_turns, ratios, summary, write
from pairs import SIZES, folder, inputs, pair, texts
from torch import Tensor

import floyd
from floyd.runtime.switches import Switches

TOLERANCE = 1e-3  # of one forward pass, and of a picture in [-1, 1]
SCHEDULER = folder("mini")


def forwards(theirs: Any, network: Any) -> dict[str, Callable[[], Tensor]]:
    """A step of a run: ours has read its prompt."""
    given = inputs(network)
    sample, (text, *label) = given["sample"], list(given.values())[1:]
    ready = network.ready(Switches.best_for("cpu"))
    context = network.read(text, *label, ready=ready, timesteps=range(980, -1, -20))
    return {
        "diffusers": lambda: theirs(timestep=500, **given).sample,
        "floyd": lambda: network.step(sample, 500, context),
    }


def stages(theirs: Any, network: Any) -> tuple[Any, Any]:
    """Stage I of both, without a text encoder: the time of a text encoder is not ours to win."""
    import diffusers

    keys = {"tokenizer": None, "text_encoder": None, "safety_checker": None, "feature_extractor": None}
    keys |= {"watermarker": None, "requires_safety_checker": False}
    incumbent = diffusers.IFPipeline(
        unet=theirs, scheduler=diffusers.DDPMScheduler.from_pretrained(SCHEDULER, subfolder="scheduler"), **keys
    )
    pipe = floyd.IFPipeline(
        unet=network, scheduler=floyd.DDPMScheduler.from_pretrained(SCHEDULER, subfolder="scheduler"), **keys
    )
    for stage in (incumbent, pipe):
        stage.set_progress_bar_config(disable=True)
    return incumbent, pipe


def painting(stage: Any, text: dict[str, Tensor], steps: int) -> Callable[[], Tensor]:

    def paint() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        painted: Tensor = stage(**text, num_inference_steps=steps, generator=generator, output_type="pt").images
        return painted

    return paint


def compared(works: dict[str, Callable[[], Tensor]], rounds: int, clock: str) -> dict[str, Any]:
    expected = works["diffusers"]()
    errors = {name: float((work() - expected).abs().max()) for name, work in works.items()}
    if far := {name: error for name, error in errors.items() if not error <= TOLERANCE}:
        raise SystemExit(f"They do not compute the same: {far}.")
    seconds = in_turns(works, rounds, clock)
    faster = ratios(seconds, to="diffusers")
    return {name: {"ratio": faster[name], "error": errors[name], **summary(seconds[name])} for name in works}


def measured(size: str, options: argparse.Namespace) -> dict[str, Any]:
    theirs, network = pair(size)
    tables = {"forward": compared(forwards(theirs, network), options.rounds, options.clock)}
    if network.config.in_channels == 3:
        incumbent, pipe = stages(theirs, network)
        text = dict(zip(("prompt_embeds", "negative_prompt_embeds"), texts(size, network), strict=True))
        works = {name: painting(s, text, options.steps) for name, s in (("diffusers", incumbent), ("floyd", pipe))}
        if options.compile:
            fast_incumbent, fast_pipe = stages(torch.compile(theirs), network)
            fast_pipe.compile()
            works["diffusers compiled"] = painting(fast_incumbent, text, options.steps)
            works["floyd compiled"] = painting(fast_pipe, text, options.steps)
        tables[f"guided stage, {options.steps} steps"] = compared(works, max(3, options.rounds // 3), options.clock)
    for what, table in tables.items():
        print(f"\n{size}, {what}")
        for name, row in table.items():
            print(
                f"  {name:20} {row['ratio']:6.3f}x {row['median'] * 1e3:10.1f} ms   error {row['error']:.1e}",
                flush=True,
            )
    return {"clock": options.clock, **tables}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["mini"], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    figures = figures_so_far("forward")
    for size in options.size:
        figures[size] = measured(size, options)
    print(write("forward", {"threads": torch.get_num_threads(), **figures}))


if __name__ == "__main__":
    main()
