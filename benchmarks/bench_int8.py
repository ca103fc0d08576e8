"""What int8 changes in pictures: the built-in cascade beside itself with one part in int8, the same prompts and seeds.

    python benchmarks/bench_int8.py [--prompts 200] [--steps 27] [--batch 16] [--scheme int8]

Every prompt is painted at 64 px by the plain networks, with T5 quantized, with the UNet, and with both; the judge reads
each picture. `judged the same`: of every claim of the prompt, the judge says the same of both pictures. `right`:
pictures that show all that their prompt says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from common import write

from floyd import Cascade
from floyd.apps.evaluate import Answer, CascadePainter, evaluate, is_same_scene, prompts
from floyd.apps.settings import Settings

PLAIN = "plain"
PARTS: dict[str, tuple[str, ...]] = {"T5": ("text_encoder",), "UNet": ("unet",), "both": ("text_encoder", "unet")}
GOAL = 0.98


def painted(parts: Sequence[str], told: argparse.Namespace) -> list[Answer]:
    """The judge's answers to all prompts, of the cascade with these parts quantized."""
    cascade = Cascade.built_in(quantization=dict.fromkeys(parts, told.scheme) or None)
    painter = CascadePainter(cascade, Settings.parsed(steps=None if told.steps is None else str(told.steps)))
    return evaluate(painter, prompts(told.prompts, seed=told.seed), batch=told.batch)


def compared(plain: Sequence[Answer], other: Sequence[Answer]) -> dict[str, Any]:
    """Of the same prompts, in the same order."""
    pairs = list(zip(plain, other, strict=True))
    same = [one.verdict.claims() == two.verdict.claims() for one, two in pairs]
    return {
        "right": share([answer.is_right for answer in other]),
        "judged_the_same": share(same),
        "same_scene": share([is_same_scene(one.reading, two.reading) for one, two in pairs]),
        "mean_difference": sum(float(abs(one.picture.astype(int) - two.picture).mean()) for one, two in pairs)
        / len(pairs),  # of 255
        "differing_prompts": [one.asked.prompt for (one, _), is_same in zip(pairs, same, strict=True) if not is_same],
    }


def share(claims: Sequence[bool]) -> float:
    return sum(claims) / len(claims)


def measured(told: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    plain: list[Answer] = []
    for name, parts in {PLAIN: (), **PARTS}.items():
        begin = time.perf_counter()
        answers = painted(parts, told)
        plain = plain or answers
        rows[name] = compared(plain, answers)
        print(f"{row(name, rows[name])}   ({time.perf_counter() - begin:.0f} s)", flush=True)
    return rows


def row(name: str, figures: Mapping[str, Any]) -> str:
    return (
        f"{name:6} right {figures['right']:6.1%}   judged the same {figures['judged_the_same']:6.1%}   "
        f"same scene {figures['same_scene']:6.1%}   differs by {figures['mean_difference']:.2f} of 255"
    )


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, help="instead of the checkpoint's own")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheme", default="int8", choices=["int8", "fp8", "int4"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dry", action="store_true", help="write no results")
    return parser.parse_args(arguments)


def main() -> None:
    told = parsed()
    if told.threads is not None:
        torch.set_num_threads(told.threads)
    rows = measured(told)
    worst = min(rows[name]["judged_the_same"] for name in ("T5", "UNet"))
    print(f"goal, with one part quantized: judged the same in at least {GOAL:.0%}; at worst {worst:.1%}")
    if not told.dry:
        settings = {"prompts": told.prompts, "steps": told.steps, "seed": told.seed, "scheme": told.scheme}
        print(write("int8" if told.scheme == "int8" else f"int8_{told.scheme}", {**settings, "rows": rows}))


if __name__ == "__main__":
    main()
