"""Steps x sampler on the built-in stage I: how many prompts come out right, and how far the pictures are from scenes.

    python benchmarks/bench_presets.py [--prompts 72] [--only DPMSolverMultistep:10 DDPM:100] [--guidance 1 1.5 3]

right      the judge sees everything that the prompt says, and no other thing
distance   Frechet distance of the pictures to the prompts' own scenes, both shrunk to 8 x 8 pixels in [0, 1]; `floor`
           is that of other scenes of as many fresh prompts
NFE        network evaluations; each is of two branches where guidance is on

The first guidance is that of all samplers; the others are tried with the sampler of the last row alone.
Every sampler paints the same prompts from the same noise. Heun evaluates twice per step, but for the last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import write

import floyd
from floyd.apps.evaluate import Asked, CascadePainter, evaluate, prompts, report
from floyd.apps.settings import Settings
from floyd.pipelines.cascade import Cascade
from floyd.scenes.render import render

GRID = (
    *(("DPMSolverMultistep", steps) for steps in (5, 8, 10, 15, 20)),
    *(("UniPCMultistep", steps) for steps in (8, 10, 15)),
    *(("DDIM", steps) for steps in (10, 20)),
    *(("EulerDiscrete", steps) for steps in (15,)),
    *(("HeunDiscrete", steps) for steps in (8,)),
    *(("EulerAncestralDiscrete", steps) for steps in (8, 10, 15, 20)),
    *(("DDPM", steps) for steps in (10, 27, 50, 100, "smart27")),
)


def scheduled(cascade: Cascade, name: str) -> Cascade:
    """Stage I alone, with another sampler."""
    stage = cascade.stages["stage_1"]
    kind = getattr(floyd, f"{name}Scheduler")
    parts = {**stage.components, "scheduler": kind.from_config(stage.scheduler.config)}
    return Cascade(type(stage)(**parts, requires_safety_checker=False), presets=cascade.presets)


def shrunk(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """[B, 192] in [0, 1]."""
    pixels_BHWC = torch.from_numpy(np.stack(pictures)).float() / 255
    small_BChw = torch.nn.functional.adaptive_avg_pool2d(pixels_BHWC.permute(0, 3, 1, 2), 8)
    return small_BChw.flatten(1).double().numpy()


def frechet(one_BE: np.ndarray, other_BE: np.ndarray) -> float:
    """Of two Gaussians with the samples' means and covariances (arXiv:1706.08500, eq. 6)."""
    means = [x_BE.mean(0) for x_BE in (one_BE, other_BE)]
    covariances = [np.cov(x_BE, rowvar=False) for x_BE in (one_BE, other_BE)]
    values = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0)
    gap = means[0] - means[1]
    return float(gap @ gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(values).sum())


def evaluations(name: str, steps: int | str, cascade: Cascade) -> int:
    stage: Any = cascade.stages["stage_1"]
    told = {"timesteps": steps} if isinstance(steps, str) else {"num_inference_steps": steps}
    return len(stage.task(prompt="a circle", **told).steps)


def measured(cascade: Cascade, name: str, steps: int | str, asked: list[Asked], guidance: float) -> dict[str, Any]:
    own = scheduled(cascade, name)
    painter = CascadePainter(own, Settings(steps=(steps,), guidance=(guidance,)))
    begin = time.monotonic()
    answers = evaluate(painter, asked, batch=24)
    seconds = time.monotonic() - begin
    result = report(answers)
    scenes = shrunk([render(one.scene, 64) for one in asked])
    return {
        "sampler": name,
        "steps": steps,
        "guidance": guidance,
        "evaluations": evaluations(name, steps, own),
        "right": result.total.everything.share,
        "splits": {split: score.everything.share for split, score in result.splits.items()},
        "claims": {kind: share.share for kind, share in result.total.claims.items()},
        "distance": frechet(shrunk([answer.picture for answer in answers]), scenes),
        "seconds_per_picture": seconds / len(asked),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=72)
    parser.add_argument("--guidance", type=float, nargs="*", default=None)
    parser.add_argument("--only", nargs="*", metavar="SAMPLER:STEPS")
    options = parser.parse_args()
    cascade = Cascade.built_in()
    asked = prompts(options.prompts)
    guidance, *others = options.guidance or [cascade.presets["stage_1"]["guidance_scale"], 1.0, 3.0]
    grid = GRID if options.only is None else [_parsed(text) for text in options.only]
    floor = frechet(*(shrunk([render(one.scene, 64) for one in prompts(options.prompts, seed=s)]) for s in (0, 1)))
    rows = []
    print(f"{'sampler':24} {'steps':>8} {'guided':>6} {'NFE':>4} {'right':>7} {'distance':>9}   floor {floor:.3f}")
    tries = [(name, steps, guidance) for name, steps in grid] + [(*grid[-1], other) for other in others]
    for name, steps, scale in tries:
        row = measured(cascade, name, steps, asked, scale)
        rows.append(row)
        counts = f"{steps!s:>8} {scale:6g} {row['evaluations']:4}"
        print(f"{name:24} {counts} {row['right']:7.1%} {row['distance']:9.3f}", flush=True)
        write("presets", {"prompts": options.prompts, "guidance": guidance, "floor": floor, "rows": rows})


def _parsed(text: str) -> tuple[str, int | str]:
    name, steps = text.split(":")
    return name, int(steps) if steps.isdigit() else steps


if __name__ == "__main__":
    main()
