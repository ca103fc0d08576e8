"""What `bench_concept.py` lets stage I paint and choose: pictures of the concept, and of what is to be kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from concept_scenes import OLD_SEED, PICTURE_SEED, WORD, Prompted, concepts, taught_scenes
from PIL import Image
from torch import Tensor

from floyd.apps.evaluate import Asked, CascadePainter, prompts
from floyd.apps.mini.data import to_tensor
from floyd.engines.registry import prepared
from floyd.pipelines.cascade import Cascade
from floyd.scenes.scene import POSITIONS, SHAPES, THING_COLORS, Scene

PAINTED, CHOSEN = 400, 132  # pictures that the first round paints, and how many of them are learned from
LEVELS = (300, 500, 650)  # timesteps of training at which pictures are compared
# Prompts of other things, of what is to be kept; and as many of small ones, that are lost first: of stars before all,
# then of crosses and rings.
OTHERS, STARS = 280, 180


def stage_one(method: str | None = None, result: Path | None = None, word: Path | None = None) -> Cascade:
    """The built-in one, with what a run wrote, and the word that it was told."""
    whole = Cascade.built_in()
    pipe = pipe_of(whole)
    if method == "textual-inversion":
        pipe.load_textual_inversion(result)
    elif method is not None:
        pipe.load_textual_inversion(word)
        pipe.load_lora_weights(result)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.use_engine("winograd")
    return Cascade(pipe, presets=whole.presets).with_quality("standard")


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
    scenes = islice(concepts(np.random.default_rng(PICTURE_SEED + 1), THING_COLORS, POSITIONS), PAINTED)
    asked = [Asked("own", scene, told, 7000 + i) for i, (scene, told) in enumerate(scenes)]
    trained = stage_one("lora", first, word)
    painted(trained, asked, folder)
    likelihood_B = likelihood(trained, stage_one(), folder, [one.prompt for one in asked])
    for alike in ([one.scene.position for one in asked], [one.scene.things[0].color for one in asked]):
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


def kept_pictures(folder: Path) -> Path:
    """What the model paints of the taught captions with each known shape in the word's place, and of other prompts."""
    texts = [told.text for _, told in islice(taught_scenes(), 12)]
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


def pipe_of(cascade: Cascade) -> Any:
    return cascade.stages["stage_1"]


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
    x_BCHW = to_tensor([np.asarray(Image.open(path)) for path in sorted(folder.glob("painted-*.png"))])
    before = pipe_of(plain)
    known = torch.stack(
        [noise_errors(before, x_BCHW, [text.replace(WORD, shape) for text in texts]) for shape in SHAPES]
    )
    return (known.amin(0) / noise_errors(pipe_of(trained), x_BCHW, texts)).log().mean(0)
