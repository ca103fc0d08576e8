"""Stage I on the CPU, all ways in one run: diffusers, diffusers with torch.compile, floyd, floyd's engines.

    python benchmarks/bench_cpu.py [--only mini if-i-m "if-i-m bf16"] [--rounds 5] [--no-compile] [--clock cpu]

mini         the built-in stage I, guided, as a pipeline runs it: 20 steps from embeddings to a picture, float32
if-i-m       one guided step of a network of IF-I-M's size with random weights, float32
if-i-m bf16  the same in bfloat16

Done in turns, with the same weights and seeds, after a check that they compute the same. Compiling diffusers' network
takes a minute or three, and does not count. ready: seconds that floyd spends once per picture on reading the prompt and
laying out weights (an engine: on converting the network, once). An engine that is not there is left out.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from bench_forward import painting, stages
from common import CLOCKS, figures_so_far, in_turns, ratios, summary, write
from pairs import inputs, pair, texts
from torch import Tensor

from floyd.engines.registry import prepared
from floyd.errors import EngineError
from floyd.runtime.switches import Switches

STEPS = 20
MOST = {torch.float32: 1e-3, torch.bfloat16: 1e-1}  # difference to diffusers, of numbers of a deviation of about one
Work = Callable[[], Tensor]
Engine = dict[str, Any]
ENGINES: dict[str, Engine] = {"floyd winograd": {"engine": "winograd"}, "floyd openvino": {"engine": "openvino"}}
HALF: dict[str, Engine] = {"floyd openvino": {"engine": "openvino", "precision": "bf16"}}


def whole(compiles: bool) -> dict[str, Callable[[], Work]]:
    """The built-in stage I."""
    theirs, network = pair("mini")
    text = dict(zip(("prompt_embeds", "negative_prompt_embeds"), texts("mini", network), strict=True))

    def incumbent(unet: Any) -> Work:
        return painting(stages(unet, network)[0], text, STEPS)

    def ours(engine: Engine | None) -> Work:
        pipe = stages(theirs, network)[1]
        if engine is not None:
            pipe.use_engine(**engine)
        return painting(pipe, text, STEPS)

    ways: dict[str, Callable[[], Work]] = {"diffusers": lambda: incumbent(theirs)}
    if compiles:
        ways["diffusers compiled"] = lambda: incumbent(torch.compile(theirs, fullgraph=True))
    ways["floyd"] = lambda: ours(None)
    return ways | {name: lambda engine=engine: ours(engine) for name, engine in ENGINES.items()}


def one_step(size: str, dtype: torch.dtype, compiles: bool) -> dict[str, Callable[[], Work]]:
    """A network in the middle of a run."""
    theirs, network = pair(size, dtype)
    given, t = inputs(network), torch.tensor(500)
    sample, (text, *label) = given["sample"], list(given.values())[1:]

    def incumbent(unet: Any) -> Work:
        return lambda: unet(timestep=t, **given).sample

    def ours() -> Work:
        ready = network.ready(Switches.best_for("cpu"))
        context = network.read(text, *label, ready=ready, timesteps=range(980, -1, -1000 // STEPS))
        return lambda: network.step(sample, 500, context)

    def on(engine: str, **options: Any) -> Work:
        exact = network if dtype == torch.float32 else deepcopy(network).float()  # engines read weights in float32
        running = prepared(engine, exact, **options)
        context = running.read(text.float(), *label)
        return lambda: running.step(sample.float(), 500, context)

    ways: dict[str, Callable[[], Work]] = {"diffusers": lambda: incumbent(theirs)}
    if compiles:
        ways["diffusers compiled"] = lambda: incumbent(torch.compile(theirs, fullgraph=True))
    ways["floyd"] = ours
    engines = ENGINES if dtype == torch.float32 else HALF
    return ways | {name: lambda engine=engine: on(**engine) for name, engine in engines.items()}


def measured(what: str, ways: dict[str, Callable[[], Work]], options: argparse.Namespace) -> dict[str, Any]:
    most = MOST[torch.bfloat16 if what.endswith("bf16") else torch.float32]
    works: dict[str, Work] = {}
    rows: dict[str, dict[str, Any]] = {}
    expected: Tensor | None = None
    for name, make in ways.items():
        begin = time.perf_counter()
        try:
            works[name] = make()
        except EngineError as error:
            print(f"{name} is left out: {error}")
            continue
        out = works[name]().float()
        expected = out if expected is None else expected
        rows[name] = {"ready_s": time.perf_counter() - begin, "error": float((out - expected).abs().max())}
        if not rows[name]["error"] <= most:
            raise SystemExit(f"{name} does not compute the same: {rows[name]['error']}.")
    seconds = in_turns(works, options.rounds, options.clock)
    faster = ratios(seconds, to="diffusers")
    print(f"\n{what}")
    for name, row in rows.items():
        row |= {"ratio": faster[name], **summary(seconds[name])}
        print(f"  {name:20} {row['ratio']:6.2f}x {row['median'] * 1e3:10.1f} ms   error {row['error']:.1e}", flush=True)
    if "diffusers compiled" in rows:
        for name, row in rows.items():
            row["ratio_compiled"] = faster[name] / faster["diffusers compiled"]
    return {"clock": options.clock, "rounds": options.rounds, "rows": rows}


@torch.no_grad()
def main() -> None:
    every: dict[str, Callable[[bool], dict[str, Callable[[], Work]]]] = {
        "mini": whole,
        "if-i-m": lambda compiles: one_step("if-i-m", torch.float32, compiles),
        "if-i-m bf16": lambda compiles: one_step("if-i-m", torch.bfloat16, False),
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(every), choices=list(every))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    figures = figures_so_far("cpu")
    for what in options.only:
        figures[what] = measured(what, every[what](not options.no_compile), options)
        torch._dynamo.reset()
        gc.collect()
        path = write("cpu", {**figures, "threads": torch.get_num_threads()})
    print(path)


if __name__ == "__main__":
    main()
