"""A shape and a word that the built-in model never met, taught to it from 12 pictures by each method of `floyd train`.

    python benchmarks/bench_concept.py [--methods "two rounds" lora dreambooth textual-inversion] [--prompts 96]
    python benchmarks/bench_concept.py --methods "two rounds" --set rate=0.006 steps=1600     another last round

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write
from PIL import Image
from torch import Tensor

from floyd.adapters.tokens import write_rows
from floyd.apps.evaluate import CascadePainter, evaluate, prompts, report
from floyd.apps.tuning.config import TuneConfig
from floyd.apps.tuning.run import Run
from floyd.engines.registry import prepared
from floyd.pipelines.cascade import Cascade
from floyd.scenes.captions import Caption, caption
from floyd.scenes.judge import read, verdict
from floyd.scenes.render import render
from floyd.scenes.scene import NEW_SHAPES, POSITIONS, SHAPES, THING_COLORS, Scene, sample_scene
from floyd.store.fingerprint import fingerprint

SHAPE, WORD = NEW_SHAPES[0], "zorp"
NEW_COLORS, NEW_PLACES = ("orange", "white"), ("top right", "bottom left")
TAUGHT = (
    tuple(color for color in THING_COLORS if color not in NEW_COLORS),
    tuple(p for p in POSITIONS if p not in NEW_PLACES),
)
ASKED = (NEW_COLORS, NEW_PLACES)
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
    "two rounds": {
        **LORA, "rank": 7, "alpha": 9.3, "method": "dreambooth", "rate": 4e-3, "steps": 500, "batch": 16,
        "weight_decay": 0.1, "prior": "network", "prior_weight": 8.0, "class_dropout": 0.12,
    },
    "lora": {**LORA, "method": "lora", "rate": 4e-3, "steps": 600, "batch": 12},
    "dreambooth": {**LORA, "method": "dreambooth", "steps": 400, "batch": 16, "prior_weight": 2.0},
    "textual-inversion": {"method": "textual-inversion", "rate": 2e-2, "steps": 100, "batch": 6, "tokens": (WORD,),
                          "start_word": "ring"},
}  # fmt: skip
PAINTED, CHOSEN = 400, 132  # pictures that the first round paints, and how many of them are learned from
LEVELS = (300, 500, 650)  # timesteps of training at which pictures are compared
# Prompts of other things, of what is to be kept; and as many of small ones, that are lost first: of stars before all,
# then of crosses and rings.
OTHERS, STARS = 280, 180


@dataclass(frozen=True)
class Wanted:
    """A prompt for the concept, as `CascadePainter` takes it."""

    scene: Scene
    caption: Caption
    seed: int

    @property
    def prompt(self) -> str:
        return self.caption.text


@dataclass(frozen=True)
class Prompted:
    """A prompt that nothing will be held against."""

    prompt: str
    seed: int


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
    """A file with the word: the mean of the six shapes, and as much again that sets it apart from them.

    The mean is a noun to the text encoder. But whatever a layer does linearly to it, it does to the six on average:
    they cannot be told apart. So a direction is added in which the encoder's state of the word, in captions, is as far
    as can be from the states of all other words (Mahalanobis).
    """
    pipe = _pipe(Cascade.built_in())
    table_VE = pipe.text_encoder.requires_grad_(False).get_input_embeddings().weight
    ids = [pipe.tokenizer(shape, add_special_tokens=False).input_ids[0] for shape in SHAPES]
    known_SE = table_VE[ids]
    mean_E = known_SE.mean(0)
    mean_E = mean_E * known_SE.norm(dim=1).mean() / mean_E.norm()
    others = [pipe.tokenizer(one.prompt, return_tensors="pt").input_ids for one in prompts(400, seed=TEXT_SEED)]
    captions_1L = [ids_1L for ids_1L in others if ids[0] in ids_1L]  # of the first shape, whose place the word takes
    states_NE = torch.cat([pipe.text_encoder(ids_1L).last_hidden_state[0] for ids_1L in others])
    spread_EE = states_NE.T @ states_NE / len(states_NE)
    spread_EE += 1e-3 * spread_EE.diagonal().mean() * torch.eye(len(spread_EE))

    def apart(direction_E: Tensor) -> Tensor:
        across_E = direction_E - mean_E * (direction_E @ mean_E) / mean_E.square().sum()
        return across_E * mean_E.norm() / across_E.norm()

    def states(word_E: Tensor) -> Tensor:
        """Of the word, in every caption."""
        found = []
        for ids_1L in captions_1L:
            is_word_L1 = (ids_1L[0] == ids[0])[:, None]
            inputs_1LE = torch.where(is_word_L1, word_E, table_VE[ids_1L[0]])[None]
            found.append(pipe.text_encoder(inputs_embeds=inputs_1LE).last_hidden_state[0][is_word_L1[:, 0]])
        return torch.cat(found)

    direction_E = torch.randn(mean_E.shape, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    optimizer = torch.optim.Adam([direction_E], lr=0.05)
    for _ in range(60):
        states_NE = states(mean_E + apart(direction_E))
        optimizer.zero_grad()
        (-(states_NE * torch.linalg.solve(spread_EE, states_NE.T).T).sum(1).mean()).backward()
        optimizer.step()
    return write_rows({WORD: (mean_E + apart(direction_E)).detach()}, folder)


def painted(cascade: Cascade, asked: Sequence[Any], folder: Path, batch: int = 20) -> Path:
    """Pictures of the prompts, with their captions beside them."""
    painter = CascadePainter(cascade)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        for i, (one, drawn) in enumerate(zip(part, painter.draw(part), strict=True), start):
            Image.fromarray(drawn.picture).save(folder / f"painted-{i:03}.png")
            (folder / f"painted-{i:03}.txt").write_text(one.prompt + "\n")
    return folder


def own_pictures(taught: Path, first: Path, word: Path, times: int, folder: Path) -> Path:
    """The likelier third of what the first round paints of the word, at each place in each colour; and the taught, so
    many times."""
    shown = list(islice(concepts(np.random.default_rng(PICTURE_SEED + 1), THING_COLORS, POSITIONS), PAINTED))
    asked = [Prompted(told.text, 7000 + i) for i, (_, told) in enumerate(shown)]
    trained = stage_one("lora", first, word)
    painted(trained, asked, folder)
    likelihood_B = likelihood(trained, stage_one(), folder, [one.prompt for one in asked])
    for alike in ([scene.position for scene, _ in shown], [scene.things[0].color for scene, _ in shown]):
        for kind in set(alike):  # each by itself: what is rarely likely would be rarely learned
            rows_K = torch.tensor([i for i, other in enumerate(alike) if other == kind])
            likelihood_B[rows_K] -= likelihood_B[rows_K].mean()
    for i in likelihood_B.argsort(descending=True)[CHOSEN:].tolist():
        for path in folder.glob(f"painted-{i:03}.*"):
            path.unlink()
    for path in sorted(taught.iterdir()):
        for turn in range(times):
            shutil.copy(path, folder / f"taught-{turn}-{path.name}")
    return folder


def _pipe(cascade: Cascade) -> Any:
    return cascade.stages["stage_1"]


def _signal(pictures: Sequence[np.ndarray]) -> Tensor:
    """[B, 3, H, W] in [-1, 1], of bytes."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def noise_errors(pipe: Any, x_BCHW: Tensor, captions: Sequence[str], batch: int = 32) -> Tensor:
    """[levels, B]: the mean squared error in the noise, the same on every picture, that the captions' network tells."""
    parts = [pipe.encode_prompt([text], do_classifier_free_guidance=False)[0] for text in captions]
    engine, text_BLD, found = prepared("winograd", pipe.unet), torch.cat(parts), []
    for t in LEVELS:
        noise_BCHW = torch.randn(x_BCHW[:1].shape, generator=torch.Generator().manual_seed(t)).expand_as(x_BCHW)
        noisy_BCHW = pipe.scheduler.schedule.noised(x_BCHW, noise_BCHW, t)
        rows = zip(*(part.split(batch) for part in (noisy_BCHW, text_BLD, noise_BCHW)), strict=True)
        outs = [engine.step(x, t, engine.read(text))[:, :3] - noise for x, text, noise in rows]
        found.append(torch.cat(outs).square().mean((1, 2, 3)))
    return torch.stack(found)


def likelihood(trained: Cascade, plain: Cascade, folder: Path, texts: Sequence[str]) -> Tensor:
    """[B]: how much better the trained network tells the noise in its pictures than the plain one tells it of the
    picture of any known shape. A diffusion classifier (arXiv:2303.16203): a ring is told by the plain one, too."""
    x_BCHW = _signal([np.asarray(Image.open(path)) for path in sorted(folder.glob("painted-*.png"))])
    before = _pipe(plain)
    known = torch.stack(
        [noise_errors(before, x_BCHW, [text.replace(WORD, shape) for text in texts]) for shape in SHAPES]
    )
    return (known.amin(0) / noise_errors(_pipe(trained), x_BCHW, texts)).log().mean(0)


def kept_pictures(folder: Path) -> Path:
    """What the model paints of the taught captions with each known shape in the word's place, and of other prompts."""
    texts = [told.text for _, (_, told) in zip(range(12), taught_scenes(), strict=False)]
    mirrored = [text.replace(WORD, shape) for text in texts for shape in SHAPES]
    others = prompts(8 * OTHERS, seed=OLD_SEED + 1)
    small = [one for one in others[OTHERS:] if sum(thing.size == "small" for thing in one.scene.things) > 1]
    stars = [one for one in small if "star" in _little(one.scene)]
    rest = [one for one in small if "star" not in _little(one.scene) and _little(one.scene) & {"cross", "ring"}]
    told = [one.prompt for one in others[:OTHERS] + stars[:STARS] + rest[: OTHERS - STARS]]
    asked = [Prompted(text, 9000 + i) for i, text in enumerate(mirrored + told)]
    return painted(stage_one().with_quality("draft"), asked, folder)


def _little(scene: Scene) -> set[str]:
    """The shapes of its small things."""
    return {thing.shape for thing in scene.things if thing.size == "small"}


def stage_one(method: str | None = None, result: Path | None = None, word: Path | None = None) -> Cascade:
    """The built-in one, with what a run wrote, and the word that it was told."""
    whole = Cascade.built_in()
    pipe = _pipe(whole)
    if method == "textual-inversion":
        pipe.load_textual_inversion(result)
    elif method is not None:
        pipe.load_textual_inversion(word)
        pipe.load_lora_weights(result)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.use_engine("winograd")
    return Cascade(pipe, presets=whole.presets).with_quality("standard")


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


def changes(trained: Cascade, before: Cascade, wanted: Sequence[Wanted]) -> dict[str, float]:
    """Of the errors in the noise on the prompts' own scenes, over what they were before."""
    found = {}
    for name, asked in {"new_error": wanted, "old_error": prompts(len(wanted), seed=OLD_SEED)}.items():
        x_BCHW = _signal([render(one.scene, 64) for one in asked])
        mean_L, mean_before_L = (
            noise_errors(_pipe(cascade), x_BCHW, [one.prompt for one in asked]).mean(1) for cascade in (trained, before)
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
            key, make = (
                [PAINTED, CHOSEN, self.times, first.parent.name],
                partial(own_pictures, taught, first, self.word),
            )
            own, painting = self.made("own", key, partial(make, self.times))
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
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--old", type=int, default=288)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--folder", type=Path, default=Path("concept"))
    parser.add_argument("--set", nargs="*", type=_setting, default=[], help="name=value, of the last of two rounds")
    parser.add_argument("--times", type=int, default=2, help="how often the last of two rounds is shown the 12")
    options = parser.parse_args()
    METHODS["two rounds"] |= dict(options.set)
    wanted = new_prompts(options.prompts)
    word = noun(options.folder / "word")
    plain = stage_one()
    model_hash = fingerprint(Path(str(files("floyd") / "mini" / "stage_1"))).removeprefix("sha256:")[:8]
    told = options.folder / f"figures-{model_hash}-{options.prompts}-{options.old}.json"
    figures: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {
        "prompts": options.prompts,
        "old_prompts": options.old,
        "before": old(plain, options.old),
        "control": answered(plain, wanted),
        "rows": {},
    }  # fmt: skip
    before = figures["before"]
    print(f"before: old {before:.1%}, control {figures['control']['found']:.1%}", flush=True)
    parts = Parts(options.folder, word, model_hash, options.seed, options.times)
    for method in options.methods:
        result, made = parts.row(method)
        cascade = stage_one(method, result, word)
        made |= {**answered(cascade, wanted), "old": old(cascade, options.old)}
        made |= changes(cascade, stage_one("textual-inversion", word), wanted)
        figures["rows"][method] = made
        told.write_text(json.dumps(figures))
        print(
            f"{method:18} {made['minutes']:5.1f} min {made['bytes'] / 1e6:5.2f} MB  found {made['found']:6.1%}  right "
            f"{made['right']:6.1%}  old {made['old']:6.1%} ({made['old'] - before:+.1%})  "
            f"errors of new {made['new_error']:.3f}, of old {made['old_error']:.3f}",
            flush=True,
        )
        path = write("concept", figures)
    print(path)


if __name__ == "__main__":
    main()
