"""What each switch of floyd.runtime.switches brings to one guided forward pass, and the error it brings with it.

    python benchmarks/ladder.py [--size mini if-i-m] [--rounds 15] [--clock cpu]

none    the network as it is, which reads the text anew at every step
alone   one switch; all but read_once need it, so it is on as well
all     every switch together; default: what is on unless it is told otherwise
ready   what is done once per picture, in forward passes of `none`
error   the largest difference from `none` in one forward pass; what it predicts has a deviation of about one

Everything in float32, in turns, in one process. Results of other sizes stay in the file.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from common import CLOCKS, figures_so_far, in_turns, ratios, write
from pairs import SIZES, inputs, ours
from torch import Tensor

from floyd.runtime.switches import Switches

TIMESTEPS = tuple(range(980, -1, -20))


def variants(device: str = "cpu") -> dict[str, Switches]:
    names = [field.name for field in fields(Switches) if field.name not in ("compiled", "graphs")]  # bench_forward's
    alone = {name: Switches(**{"read_once": True, name: True}) for name in names}
    return {"none": Switches.off(), **alone, "all": Switches.on(), "default": Switches.best_for(device)}


def forward(network: Any, switches: Switches, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One step in the middle of a run."""
    if not switches.read_once:
        return lambda: network(timestep=500, **given).sample
    sample, (text, *label) = given["sample"], list(given.values())[1:]
    timesteps = TIMESTEPS if switches.time_table else ()
    context = network.read(text, *label, ready=network.ready(switches), timesteps=timesteps)
    return lambda: network.step(sample, 500, context)


def climbed(size: str, rounds: int, clock: str) -> dict[str, Any]:
    network, now = ours(size), CLOCKS[clock]
    given = inputs(network)
    works, once = {}, {}
    for name, switches in variants().items():
        begin = now()
        works[name] = forward(network, switches, given)
        works[name]()  # weights are laid out, and times tabled, when they are first asked for
        once[name] = now() - begin
    expected = works["none"]()
    errors = {name: float((work() - expected).abs().max()) for name, work in works.items()}
    seconds = in_turns(works, rounds, clock)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    faster = ratios(seconds, to="none")
    rows = {
        name: {
            "ratio": faster[name],
            "error": errors[name],
            "ready": max(0.0, once[name] - median[name]) / median["none"],
            "seconds": seconds[name],
        }
        for name in works
    }
    print(f"\n{size}{'':{24 - len(size)}} {'ratio':>7} {'error':>9} {'ready':>7}")
    for name, row in rows.items():
        print(f"{name:24} {row['ratio']:6.3f}x {row['error']:9.1e} {row['ready']:7.2f}", flush=True)
    return {"deviation": float(expected.std()), "rounds": rounds, "clock": clock, "rows": rows}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["mini"], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    figures = figures_so_far("ladder")
    for size in options.size:
        figures[size] = climbed(size, options.rounds, options.clock)
    print(write("ladder", {"threads": torch.get_num_threads(), **figures}))


if __name__ == "__main__":
    main()
