"""Tables of the docs, from results/*.json, so that pages and results cannot differ.

    python benchmarks/tables.py [--write]

A table stands between `<!-- name -->` and `<!-- /name -->`; `--write` puts the newest there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = Path(__file__).parent / "results"
WAYS = ("diffusers", "diffusers compiled", "floyd", "floyd winograd", "floyd openvino")
WORKS = {
    "mini": "built-in stage I, guided, 20 steps, float32",
    "if-i-m": "one guided step of IF-I-M's size, float32",
    "if-i-m bf16": "the same in bfloat16",
}


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def grid(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def ratio(row: dict[str, Any] | None, key: str = "ratio") -> str:
    return "" if row is None or key not in row else f"{row[key]:.2f}"


def cpu(machine: str = "") -> str:
    """How many times as fast as diffusers; what is behind a slash is beside diffusers with torch.compile."""
    figures = read(f"{machine}cpu")["figures"]
    ways = [way for way in WAYS if any(way in figures[what]["rows"] for what in WORKS if what in figures)]
    rows = []
    for what, words in WORKS.items():
        if what not in figures:
            continue
        own = figures[what]["rows"]
        cells = [f"{1e3 * own['diffusers']['median']:.0f} ms"]
        for way in ways[1:]:
            beside = ratio(own.get(way), "ratio_compiled")
            cells.append(ratio(own.get(way)) + (f" / {beside}" if beside and way.startswith("floyd") else ""))
        rows.append([words, *cells])
    return grid(["", *ways], rows)


def cascade(machine: str = "") -> str:
    own = read(f"{machine}cascade")["figures"]["rows"]
    parts = list(own["diffusers"]["parts"])
    rows = [
        [way, f"{row['median']:.1f} s", ratio(row), *(f"{row['parts'][part]:.1f} s" for part in parts)]
        for way, row in own.items()
    ]
    return grid(["", "whole", "ratio", *parts], rows)


def batches() -> str:
    own = read("batches")["figures"]["rows"]
    counts = list(own["diffusers"])
    rows = [
        [way, *(f"{row[n]['pictures_per_s']:.2f}" for n in counts), *(f"{row[n]['cost']:.1f}" for n in counts[1:])]
        for way, row in own.items()
    ]
    return grid(["", *(f"{n} at once" for n in counts), *(f"cost of {n}" for n in counts[1:])], rows)


def start() -> str:
    own = read("start")["figures"]
    rows = [
        [
            name,
            f"{row['step']['median']:.2f} s",
            ratio(row["step"]),
            f"{row['whole']['median']:.2f} s",
            ratio(row["whole"]),
        ]
        for name, row in own.items()
    ]
    return grid(["", "to the first step", "ratio", "whole process", "ratio"], rows)


def concept() -> str:
    figures = read("concept")["figures"]
    rows = [
        [
            f"{method}, {row['steps']} steps of {row['batch']}",
            f"{row['minutes']:.1f}",
            f"{row['bytes'] / 1e3:.0f} kB",
            f"{row['found']:.1%}",
            f"{row['right']:.1%}",
            f"{row['old']:.1%}",
            f"{100 * (row['old'] - figures['before']):+.1f}",
        ]
        for method, row in figures["rows"].items()
    ]
    head = ["", "minutes", "file", "new prompts that show it", "and all else they say", "old prompts right", "change"]
    return grid(
        head, [*rows, ["before", "", "", f"{figures['control']['found']:.1%}", "", f"{figures['before']:.1%}", ""]]
    )


def dreambooth() -> str:
    figures = read("dreambooth")["figures"]
    names = {"floyd": "floyd", "no compiler": "floyd without a compiler"}
    rows = []
    for precision in ("fp32", "bf16"):
        own = figures[precision]
        for side, name in {**names, "diffusers": "diffusers"}.items():
            ratios = own["ratios"].get(side)
            told = ["", "", ""] if ratios is None else [f"{ratios[key]:.2f}" for key in own[side]]
            rows.append([f"{name}, {precision}", f"{own[side]['steps_per_s']['median']:.2f}", *told])
    return grid(["", "steps a second", "ratio", "of processor time", "of peak memory"], rows)


def presets(name: str, choose: Callable[..., int]) -> str:
    """The ways to paint that were tried with as many prompts as `choose` says."""
    figures = read(name)["figures"]
    num_prompts = choose(row["prompts"] for row in figures["rows"])
    rows = []
    for row in (row for row in figures["rows"] if row["prompts"] == num_prompts):
        sampler = row["sampler"] + ("" if row["spacing"] is None else f", {row['spacing']}")
        sampler += "" if row["network"] == "built-in" else ", the student"
        guidance = f"{row['guidance']:g}"
        guidance += "" if row["interval"] is None else ", from {} to {}".format(*row["interval"])
        against = ""
        if "difference" in row:
            against = "{:+.1f} ± {:.1f}".format(*(100 * row["difference"][key] for key in ("mean", "error")))
        right = f"{100 * row['right']:.1f} %"
        rows.append([sampler, str(row["steps"]), guidance, str(row["rows"]), right, against, f"{row['distance']:.2f}"])
    floor = f"scenes of {num_prompts} other prompts"
    head = ["sampler", "steps", "guidance", "rows", "right", "against DDPM-100", "distance"]
    return grid(head, [*rows, [floor, "", "", "", "", "", f"{figures['floors'][str(num_prompts)]:.2f}"]])


TABLES: dict[str, Callable[[], str]] = {
    "cpu": cpu,
    "cascade": cascade,
    "avx2/cpu": partial(cpu, "avx2/"),
    "avx2/cascade": partial(cascade, "avx2/"),
    "batches": batches,
    "start": start,
    "presets:most": partial(presets, "presets", max),
    "presets:fewest": partial(presets, "presets", min),
    "student": partial(presets, "student", max),
    "concept": concept,
    "dreambooth": dreambooth,
}


def measured() -> dict[str, Callable[[], str]]:
    """What is behind a colon tells tables of the same results apart."""
    return {name: table for name, table in TABLES.items() if (RESULTS / f"{name.partition(':')[0]}.json").exists()}


def written(page: str) -> str:
    for name, table in measured().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = page.partition(begin)
        if found:
            page = before + begin + table() + "\n" + rest[rest.index(end) :]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        for path in DOCS.glob("*.md"):
            path.write_text(written(path.read_text()))
    for name, table in measured().items():
        print(f"{name}\n\n{table()}\n")


if __name__ == "__main__":
    main()
