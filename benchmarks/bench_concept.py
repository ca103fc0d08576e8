"""A shape and a word that the built-in model never met, taught to it from 12 pictures by each method of `floyd train`.

    python benchmarks/bench_concept.py [--methods "two rounds" lora dreambooth textual-inversion] [--prompts 96]
    python benchmarks/bench_concept.py --methods "two rounds" --set rate=0.004 steps=500     another last round
    python benchmarks/bench_concept.py --methods "two rounds" --fresh 100     other prompts of the same kind

What is in `--folder` already and was made with the same settings is not made again, and its minutes are told again:
LoRA alone, which is the first of the two rounds, every other run, and the pictures. So are the figures of the plain
model, and the rows of methods that are not asked for.

The shape is a crescent, the word "zorp". It is taught in six colours and at seven places: six times alone, and six
times beside a thing that the model knows. Asked for are the two other colours, at the two other places. It is always
large: of a small one 64 px leave the judge little to see.

found      the judge sees a crescent in the picture of a new prompt
right      ... and everything else that the prompt says, and no other thing
old        prompts of the built-in model's own evaluation that come out right, before and after
errors     in the noise that is told in the new prompts' own scenes, and in those of old ones, over those before:
           finer than pictures that are right or wrong
control    crescents in the pictures of the same new prompts before any training: what the judge finds by mistake

lora        the 12 pictures and nothing else: the shape carries over to new colours, and to every other word
dreambooth  LoRA, held to what the model itself painted of other prompts: it learns the 12 captions by heart
two rounds  LoRA alone paints the word in every colour and place, and its network says which of these pictures are
            likely ones; a fresh LoRA then learns them and the 12, held to what the network said, before, of the same
            captions with every known shape in the word's place, and of other prompts

All but inversion are told a word: in pieces "zorp" is no noun to the text encoder, which then does not bind colour and
place to it. See `noun`. All is painted by the winograd engine, for which LoRA is fused, and with the sampler of
`--quality standard`; what is to be kept, with that of draft.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import write
from concept_pictures import (
    CHOSEN,
    OTHERS,
    PAINTED,
    STARS,
    kept_pictures,
    noise_errors,
    own_pictures,
    pipe_of,
    stage_one,
)
from concept_scenes import NEW_COLORS, OLD_SEED, SHAPE, WORD, new_prompts, noun, pictures

from floyd.apps.evaluate import Asked, CascadePainter, evaluate, prompts, report
from floyd.apps.mini.data import to_tensor
from floyd.apps.tuning.config import TuneConfig
from floyd.apps.tuning.run import Run
from floyd.pipelines.cascade import Cascade
from floyd.scenes.judge import read, verdict
from floyd.scenes.render import render
from floyd.scenes.scene import NEW_SHAPES, SHAPES
from floyd.store.fingerprint import fingerprint

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
    "two rounds": {
        **LORA, "rank": 7, "alpha": 9.3, "method": "dreambooth", "steps": 1600, "batch": 16,
        "weight_decay": 0.2, "prior": "network", "prior_weight": 6.0, "class_dropout": 0.12,
    },
    "lora": {**LORA, "method": "lora", "rate": 4e-3, "steps": 600, "batch": 12},
    "dreambooth": {**LORA, "method": "dreambooth", "steps": 400, "batch": 16, "prior_weight": 2.0},
    "textual-inversion": {"method": "textual-inversion", "rate": 2e-2, "steps": 100, "batch": 6, "tokens": (WORD,),
                          "start_word": "ring"},
}  # fmt: skip


def answered(cascade: Cascade, wanted: Sequence[Asked], batch: int = 20) -> dict[str, Any]:
    """The share of the new prompts that show the concept, of all and of each colour's."""
    painter, found, right = CascadePainter(cascade), [], 0
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        for one, drawn in zip(part, painter.draw(part), strict=True):
            reading = read(drawn.picture, shapes=SHAPES + NEW_SHAPES)
            found.append(any(thing.shape == SHAPE for thing in reading.things))
            right += verdict(one.caption.claims, reading).everything
    of_color = {
        color: fmean(seen for seen, one in zip(found, wanted, strict=True) if one.scene.things[0].color == color)
        for color in NEW_COLORS
    }
    return {"found": fmean(found), "found_of": of_color, "right": right / len(wanted)}


def old(cascade: Cascade, asked: Sequence[Asked]) -> float:
    share = report(evaluate(CascadePainter(cascade), asked, batch=24)).total.everything.share
    assert share is not None
    return share


def changes(trained: Cascade, before: Cascade, wanted: Sequence[Asked], known: Sequence[Asked]) -> dict[str, float]:
    """Of the errors in the noise on the prompts' own scenes, over what they were before."""
    found = {}
    for name, asked in {"new_error": wanted, "old_error": known}.items():
        x_BCHW = to_tensor([render(one.scene, 64) for one in asked])
        mean_L, mean_before_L = (
            noise_errors(pipe_of(cascade), x_BCHW, [one.prompt for one in asked]).mean(1)
            for cascade in (trained, before)
        )
        found[name] = float((mean_L / mean_before_L).mean())
    return found


@dataclass(frozen=True)
class Parts:
    """What the methods are made of, each in a folder named after its settings and the model."""

    folder: Path
    word: Path
    model_hash: str
    seed: int
    times: int  # how often the 12 come beside what the first round painted

    def settings(self, method: str) -> dict[str, Any]:
        return {**COMMON, **METHODS[method], "seed": self.seed}

    def row(self, method: str) -> tuple[Path, dict[str, Any]]:
        """The run's file, and what it cost, the painting of pictures included."""
        settings, minutes = self.settings(method), 0.0
        taught = pictures(self.folder / "taught")
        told = {"data": str(taught)}
        if method == "two rounds":
            first, spent = self.run("lora", self.settings("lora"), told)
            make = partial(own_pictures, taught, first, self.word, self.times)
            own, painting = self.made("own", [PAINTED, CHOSEN, self.times, first.parent.name], make)
            told = {"data": str(own)}
            minutes += spent + painting
        if settings["method"] == "dreambooth":
            kept, spent = self.made("kept", [OTHERS, STARS], kept_pictures)
            told["class_data"] = str(kept)
            minutes += spent
        result, spent = self.run(method, settings, told)
        return result, {
            **{name: settings[name] for name in ("steps", "batch", "rate", "seed")},
            "minutes": minutes + spent,
            "bytes": result.stat().st_size,
            "threads": torch.get_num_threads(),
        }

    def run(self, label: str, settings: dict[str, Any], told: dict[str, str]) -> tuple[Path, float]:
        words = {} if settings["method"] == "textual-inversion" else {"words": str(self.word)}

        def train(folder: Path) -> None:
            _tuned(label, {**settings, **told, **words, "out": str(folder)})

        out, minutes = self.made(label, [settings, *(Path(path).name for path in told.values())], train)
        (result,) = out.glob("*.safetensors")
        return result, minutes

    def made(self, label: str, key: Any, make: Callable[[Path], Any]) -> tuple[Path, float]:
        """The folder, filled now or before, and the minutes that it took."""
        mark = sha256(json.dumps([self.model_hash, key], sort_keys=True).encode()).hexdigest()[:8]
        folder = self.folder / f"{label.replace(' ', '-')}-{mark}"
        minutes = folder.with_suffix(".minutes")
        if not minutes.exists():
            shutil.rmtree(folder, ignore_errors=True)
            begin = time.monotonic()
            make(folder)
            minutes.write_text(str((time.monotonic() - begin) / 60))
        return folder, float(minutes.read_text())


def _tuned(label: str, told: dict[str, Any]) -> None:
    for moment in Run(TuneConfig.of(**told, device="cpu")).moments():
        if moment.label == "training" and moment.done % 25 == 0:
            print(f"  {label} {moment.done}/{moment.total} {json.dumps(moment.losses)}", flush=True)


def _setting(text: str) -> tuple[str, Any]:
    """name=value, the value in JSON; a word needs no quotes."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--old", type=int, default=288)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--folder", type=Path, default=Path("concept"))
    parser.add_argument(
        "--fresh",
        type=int,
        default=0,
        help="Other prompts, which no setting was chosen by: 100, say; 1 is learned from.",
    )
    parser.add_argument("--set", nargs="*", type=_setting, default=[], help="name=value, of the last of two rounds")
    parser.add_argument("--times", type=int, default=2, help="how often the last of two rounds is shown the 12")
    options = parser.parse_args()
    METHODS["two rounds"] |= dict(options.set)
    wanted = new_prompts(options.prompts, options.fresh)
    seed = OLD_SEED + options.fresh
    known = prompts(options.old, seed=seed)
    word = noun(options.folder / "word")
    plain, untaught = stage_one(), stage_one("textual-inversion", word)  # without the word, and with it
    model_hash = fingerprint(Path(str(files("floyd") / "mini" / "stage_1"))).removeprefix("sha256:")[:8]
    fresh = f"-fresh-{options.fresh}" if options.fresh else ""
    told = options.folder / f"figures-{model_hash}-{options.prompts}-{options.old}{fresh}.json"
    figures: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {
        "prompts": options.prompts,
        "old_prompts": options.old,
        "before": old(plain, known),
        "control": answered(plain, wanted),
        "rows": {},
    }  # fmt: skip
    before = figures["before"]
    print(f"before: old {before:.1%}, control {figures['control']['found']:.1%}", flush=True)
    parts = Parts(options.folder, word, model_hash, options.seed, options.times)
    for method in options.methods:
        result, made = parts.row(method)
        cascade = stage_one(method, result, word)
        made |= {**answered(cascade, wanted), "old": old(cascade, known)}
        made |= changes(cascade, untaught, wanted, prompts(len(wanted), seed=seed))
        figures["rows"][method] = made
        told.write_text(json.dumps(figures))
        print(
            f"{method:18} {made['minutes']:5.1f} min {made['bytes'] / 1e6:5.2f} MB  found {made['found']:6.1%}  right "
            f"{made['right']:6.1%}  old {made['old']:6.1%} ({made['old'] - before:+.1%})  "
            f"errors of new {made['new_error']:.3f}, of old {made['old_error']:.3f}",
            flush=True,
        )
        path = write("concept" + fresh.replace("-", "_"), figures)
    print(path)


if __name__ == "__main__":
    main()
