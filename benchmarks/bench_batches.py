"""1, 4 and 16 prompts in one call of the built-in stage I: pictures per second, beside diffusers.

    python benchmarks/bench_batches.py [--rounds 3] [--steps 10] [--clock cpu]

cost    seconds of the call over those of one prompt, of the same side
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bench_forward import painting, stages
from common import CLOCKS, in_turns, summary, write
from pairs import pair, texts
from torch import Tensor

from floyd.errors import EngineError

COUNTS = (1, 4, 16)
TOLERANCE = 1e-3


def works(steps: int) -> dict[tuple[str, int], Callable[[], Tensor]]:
    theirs, network = pair("mini")
    incumbent, pipe = stages(theirs, network)
    found: dict[str, Any] = {"diffusers": incumbent, "floyd": pipe}
    try:
        found["floyd winograd"] = stages(theirs, network)[1]
        found["floyd winograd"].use_engine("winograd")
    except EngineError as error:
        print(f"floyd winograd is left out: {error}")
        del found["floyd winograd"]
    names = ("prompt_embeds", "negative_prompt_embeds")
    read = texts("mini", network)
    table = {}
    for count in COUNTS:
        text = {name: part.repeat(count, 1, 1) for name, part in zip(names, read, strict=True)}
        for name, stage in found.items():
            table[name, count] = painting(stage, text, steps)
    return table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    table = works(options.steps)
    for name, count in table:
        error = float((table[name, count]() - table["diffusers", count]()).abs().max())
        if not error <= TOLERANCE:
            raise SystemExit(f"{name} with {count} prompts does not paint the same: {error}.")
    seconds = in_turns(
        {f"{name}, {count}": work for (name, count), work in table.items()}, options.rounds, options.clock
    )
    rows: dict[str, dict[str, Any]] = {}
    for name, count in table:
        row = summary(seconds[f"{name}, {count}"])
        own = rows.setdefault(name, {})
        first = own.get("1", row)
        row |= {"pictures_per_s": count / row["median"], "cost": row["median"] / first["median"]}
        row["ratio"] = rows["diffusers"].get(str(count), row)["median"] / row["median"]
        own[str(count)] = row
        print(
            f"{name:16} {count:3}  {row['pictures_per_s']:7.3f} pictures/s  cost {row['cost']:6.2f}  "
            f"{row['ratio']:5.2f}x",
            flush=True,
        )
    figures = {"threads": torch.get_num_threads(), "steps": options.steps, "clock": options.clock, "rows": rows}
    print(write("batches", figures))


if __name__ == "__main__":
    main()
