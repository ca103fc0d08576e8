"""A shape and a word that the built-in model never met, taught to it from 12 pictures by each method of `floyd train`.

    python benchmarks/bench_concept.py [--methods lora dreambooth textual-inversion] [--steps 600] [--prompts 60]

The shape is a crescent, the word "zorp". It is taught in four colours, in the middle and at the sides of the picture:
six times alone, and six times beside a thing that the model knows, which shows it which of the words is new. Asked for
are the four other colours, in the corners.

found      the judge sees a crescent in the picture of a new prompt
right      ... and everything else that the prompt says, and no other thing
old        prompts of the built-in model's own evaluation that come out right, before and after
control    crescents in the pictures of the same new prompts before any training: what the judge finds by mistake
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write
from PIL import Image

from floyd.apps.evaluate import CascadePainter, evaluate, prompts, report
from floyd.apps.tuning.config import TuneConfig
from floyd.apps.tuning.run import Run
from floyd.pipelines.cascade import Cascade
from floyd.scenes.captions import Caption, caption
from floyd.scenes.judge import read, verdict
from floyd.scenes.render import render
from floyd.scenes.scene import NEW_SHAPES, POSITIONS, SHAPES, SIZES, Scene, sample_scene

SHAPE, WORD = NEW_SHAPES[0], "zorp"
TAUGHT = (("red", "green", "blue", "yellow"), ("left", "right", "top", "bottom", "center"))  # colours, places
ASKED = (("orange", "purple", "black", "white"), tuple(place for place in POSITIONS if " " in place))
TEXT_SEED, PICTURE_SEED, OLD_SEED = 41, 42, 43
# As the built-in stage I itself was trained: its noisy end decides where things are.
WEIGHING = {"snr_gamma": 100.0, "snr_floor": 1.0, "noisy_share": 0.35}
COMMON: dict[str, Any] = {"batch": 12, "warmup": 20, "last_rate": 0.1, "ema": 0.98, "precision": "fp32", **WEIGHING}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rate": 2e-3, "rank": 4, "alpha": 4.0},
    "dreambooth": {"rate": 2e-3, "rank": 4, "alpha": 4.0, "class_pictures": 48, "prior_weight": 1.0},
    "textual-inversion": {"rate": 2e-2, "tokens": (WORD,), "start_word": "ring"},
}
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "conv1", "conv2")


@dataclass(frozen=True)
class Wanted:
    """A prompt for the concept, as `CascadePainter` takes it."""

    scene: Scene
    caption: Caption
    seed: int

    @property
    def prompt(self) -> str:
        return self.caption.text


def concepts(
    rng: np.random.Generator, colors: Sequence[str], places: Sequence[str], *, things: int = 1
) -> Iterator[tuple[Scene, Caption]]:
    """Scenes of a crescent in every colour in turn, small and large, on any background that shows it.

    Alone, at one of the places; or beside a known thing to which it stands somehow.
    """
    turn = 0
    while True:
        scene = sample_scene(rng, split="any", things=things)
        first, *others = scene.things
        color, size = colors[turn % len(colors)], SIZES[(turn + turn // len(colors)) % 2]
        is_placed = scene.relation is not None if others else scene.position in places
        if is_placed and (first.color, first.size) == (color, size):
            scene = replace(scene, things=(replace(first, shape=SHAPE), *others))
            yield scene, caption(scene, rng)
            turn += 1


def taught_scenes() -> Iterator[tuple[Scene, Caption]]:
    """Alone and in company, in turn."""
    rng = np.random.default_rng(TEXT_SEED)
    alone, company = concepts(rng, *TAUGHT), concepts(rng, *TAUGHT, things=2)
    while True:
        yield next(alone)
        yield next(company)


def pictures(folder: Path, count: int = 12) -> Path:
    """The training set: PNG files with their captions beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, (scene, told) in zip(range(count), taught_scenes(), strict=False):
        Image.fromarray(render(scene, 256)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(told.text + "\n")
    return folder


def new_prompts(count: int) -> list[Wanted]:
    rng = np.random.default_rng(PICTURE_SEED)
    return [
        Wanted(scene, told, 1000 + i) for i, (scene, told) in zip(range(count), concepts(rng, *ASKED), strict=False)
    ]


def stage_one() -> Cascade:
    whole = Cascade.built_in()
    return Cascade(whole.stages["stage_1"], presets=whole.presets)


def taught(method: str, result: Path) -> Cascade:
    """The built-in stage I with what a run wrote."""
    cascade = stage_one()
    pipe: Any = cascade.stages["stage_1"]
    if method == "textual-inversion":
        pipe.load_textual_inversion(result)
        return cascade
    pipe.load_lora_weights(result)
    return cascade


def answered(cascade: Cascade, wanted: Sequence[Wanted], batch: int = 20) -> dict[str, float]:
    """How many of the new prompts show the concept."""
    painter, found, right = CascadePainter(cascade), 0, 0
    for start in range(0, len(wanted), batch):
        part: Any = wanted[start : start + batch]
        for one, drawn in zip(part, painter.draw(part), strict=True):
            reading = read(drawn.picture, shapes=SHAPES + NEW_SHAPES)
            found += any(thing.shape == SHAPE for thing in reading.things)
            right += verdict(one.caption.claims, reading).everything
    return {"found": found / len(wanted), "right": right / len(wanted)}


def old(cascade: Cascade, count: int) -> float:
    share = report(evaluate(CascadePainter(cascade), prompts(count, seed=OLD_SEED), batch=24)).total.everything.share
    assert share is not None
    return share


def trained(method: str, data: Path, folder: Path, steps: int) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    told = {**COMMON, **METHODS[method], "method": method, "data": str(data), "out": str(folder), "steps": steps}
    if method != "textual-inversion":
        told["targets"] = LAYERS
    if method == "dreambooth":
        told["class_prompt"] = tuple(one.prompt for one in prompts(24, seed=OLD_SEED + 1))
    run, begin = Run(TuneConfig.of(**told, device="cpu")), time.monotonic()
    for moment in run.moments():
        if moment.label == "training" and moment.done % 25 == 0:
            print(f"  {method} {moment.done}/{moment.total} {json.dumps(moment.losses)}", flush=True)
    return {"result": run.result, "minutes": (time.monotonic() - begin) / 60, "bytes": run.result.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--old", type=int, default=120)
    parser.add_argument("--folder", type=Path, default=Path("concept"))
    options = parser.parse_args()
    data, wanted = pictures(options.folder / "pictures"), new_prompts(options.prompts)
    plain = stage_one()
    before = old(plain, options.old)
    control = answered(plain, wanted)
    print(f"before: old {before:.1%}, control {control['found']:.1%}", flush=True)
    rows = []
    for method in options.methods:
        made = trained(method, data, options.folder / method, options.steps)
        cascade = taught(method, made.pop("result"))
        row = {"method": method, **made, **answered(cascade, wanted), "old": old(cascade, options.old)}
        rows.append(row)
        print(
            f"{method:18} {row['minutes']:5.1f} min {row['bytes'] / 1e6:5.2f} MB  found {row['found']:6.1%}  right "
            f"{row['right']:6.1%}  old {row['old']:6.1%} ({row['old'] - before:+.1%})",
            flush=True,
        )
    figures = {
        "steps": options.steps,
        "prompts": options.prompts,
        "old_prompts": options.old,
        "threads": torch.get_num_threads(),
    }
    print(write("concept", {**figures, "before": before, "control": control, "rows": rows}))


if __name__ == "__main__":
    main()
