"""A shape and a word that the built-in model never met, taught to it from 12 pictures by each method of `floyd train`.

    python benchmarks/bench_concept.py [--methods dreambooth lora textual-inversion] [--prompts 32] [--old 48]

The shape is a crescent, the word "zorp". It is taught in four colours, in the middle and at the sides of the picture:
six times alone, and six times beside a thing that the model knows, which shows it which of the words is new. Asked for
are the four other colours, in the corners. It is always large: of a small one 64 px leave the judge little to see.

found      the judge sees a crescent in the picture of a new prompt
right      ... and everything else that the prompt says, and no other thing
old        prompts of the built-in model's own evaluation that come out right, before and after
control    crescents in the pictures of the same new prompts before any training: what the judge finds by mistake

dreambooth is LoRA, too, with pictures that the model itself painted of other prompts, so that it keeps what it knew.
Both are told a word: spelled out in pieces "zorp" is no noun to the text encoder, which then does not bind colour and
place to it. The word's embedding is the mean of those of the six shapes: a thing of no particular shape, see `noun`.
All is painted with the built-in preset, by the winograd engine; LoRA is fused for it.
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

from floyd.adapters.tokens import write_rows
from floyd.apps.evaluate import CascadePainter, evaluate, prompts, report
from floyd.apps.tuning.config import TuneConfig
from floyd.apps.tuning.run import Run
from floyd.pipelines.cascade import Cascade
from floyd.scenes.captions import Caption, caption
from floyd.scenes.judge import read, verdict
from floyd.scenes.render import render
from floyd.scenes.scene import NEW_SHAPES, POSITIONS, SHAPES, Scene, sample_scene

SHAPE, WORD = NEW_SHAPES[0], "zorp"
TAUGHT = (("red", "green", "blue", "yellow"), ("left", "right", "top", "bottom", "center"))  # colours, places
ASKED = (("orange", "purple", "black", "white"), tuple(place for place in POSITIONS if " " in place))
TEXT_SEED, PICTURE_SEED, OLD_SEED = 41, 42, 43
LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "encoder_hid_proj"),
    *(f"up_blocks.0.resnets.{i}.conv1" for i in range(3)),
    *(f"up_blocks.{level}.resnets.{i}.{conv}" for level in (1, 2) for i in (0, 1) for conv in ("conv1", "conv2")),
)
# What the noisy end decides, where and in which colour a thing is, the model knows; shapes come after it.
WEIGHING = {"snr_gamma": 100.0, "snr_floor": 0.2, "noisy_share": 0.5}
COMMON: dict[str, Any] = {"caption_dropout": 0.0, "warmup": 10, "last_rate": 0.02, "ema": 0.98, **WEIGHING}
LORA: dict[str, Any] = {"rate": 6e-3, "rank": 6, "alpha": 8.0, "targets": LAYERS}
METHODS: dict[str, dict[str, Any]] = {
    "dreambooth": {**LORA, "rate": 4e-3, "steps": 700, "batch": 12, "class_pictures": 96, "prior_weight": 2.0},
    "lora": {**LORA, "steps": 250, "batch": 8},
    "textual-inversion": {"rate": 2e-2, "steps": 100, "batch": 6, "tokens": (WORD,), "start_word": "ring"},
}


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
    """Scenes of a large crescent in every colour in turn, on any background that shows it.

    Alone, at one of the places; or beside a known thing to which it stands somehow.
    """
    turn = 0
    while True:
        scene = sample_scene(rng, split="any", things=things)
        first, *others = scene.things
        is_placed = scene.relation is not None if others else scene.position in places
        if is_placed and (first.color, first.size) == (colors[turn % len(colors)], "large"):
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


def noun(folder: Path) -> Path:
    """A file with the word: the mean of what the text encoder knows of the six shapes, as long as they are."""
    pipe: Any = Cascade.built_in().stages["stage_1"]
    ids = [pipe.tokenizer(shape, add_special_tokens=False).input_ids[0] for shape in SHAPES]
    known_SE = pipe.text_encoder.get_input_embeddings().weight.detach()[ids]
    mean_E = known_SE.mean(0)
    return write_rows({WORD: mean_E * known_SE.norm(dim=1).mean() / mean_E.norm()}, folder)


def stage_one(method: str | None = None, result: Path | None = None, word: Path | None = None) -> Cascade:
    """The built-in one, with what a run wrote, and the word that it was told."""
    whole = Cascade.built_in()
    pipe: Any = whole.stages["stage_1"]
    if method == "textual-inversion":
        pipe.load_textual_inversion(result)
    elif method is not None:
        pipe.load_textual_inversion(word)
        pipe.load_lora_weights(result)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.use_engine("winograd")
    return Cascade(pipe, presets=whole.presets)


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


def trained(method: str, data: Path, folder: Path, word: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    told = {**COMMON, **METHODS[method], "method": method, "data": str(data), "out": str(folder)}
    if method != "textual-inversion":
        told["words"] = str(word)
    if method == "dreambooth":
        told["class_prompt"] = tuple(one.prompt for one in prompts(96, seed=OLD_SEED + 1))
    run, begin = Run(TuneConfig.of(**told, device="cpu")), time.monotonic()
    for moment in run.moments():
        if moment.label == "training" and moment.done % 25 == 0:
            print(f"  {method} {moment.done}/{moment.total} {json.dumps(moment.losses)}", flush=True)
    settings = {name: told[name] for name in ("steps", "batch", "rate")}
    return {
        **settings,
        "result": run.result,
        "minutes": (time.monotonic() - begin) / 60,
        "bytes": run.result.stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--old", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=Path("concept"))
    options = parser.parse_args()
    data, wanted = pictures(options.folder / "pictures"), new_prompts(options.prompts)
    word = noun(options.folder / "word")
    plain = stage_one()
    before, control = old(plain, options.old), answered(plain, wanted)
    print(f"before: old {before:.1%}, control {control['found']:.1%}", flush=True)
    figures = {"prompts": options.prompts, "old_prompts": options.old, "threads": torch.get_num_threads()}
    rows: list[dict[str, Any]] = []
    for method in options.methods:
        made = trained(method, data, options.folder / method, word)
        cascade = stage_one(method, made.pop("result"), word)
        row = {"method": method, **made, **answered(cascade, wanted), "old": old(cascade, options.old)}
        rows.append(row)
        print(
            f"{method:18} {row['minutes']:5.1f} min {row['bytes'] / 1e6:5.2f} MB  found {row['found']:6.1%}  right "
            f"{row['right']:6.1%}  old {row['old']:6.1%} ({row['old'] - before:+.1%})",
            flush=True,
        )
        path = write("concept", {**figures, "before": before, "control": control, "rows": rows})
    print(path)


if __name__ == "__main__":
    main()
