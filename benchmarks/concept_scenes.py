"""The concept that `bench_concept.py` teaches: a crescent, the word "zorp", the 12 pictures, and the new prompts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from floyd.adapters.tokens import write_rows
from floyd.apps.evaluate import Asked, prompts
from floyd.pipelines.cascade import Cascade
from floyd.scenes.captions import Caption, caption
from floyd.scenes.render import render
from floyd.scenes.scene import NEW_SHAPES, POSITIONS, SHAPES, THING_COLORS, Scene, sample_scene

SHAPE, WORD = NEW_SHAPES[0], "zorp"
NEW_COLORS, NEW_PLACES = ("orange", "white"), ("top right", "bottom left")
TAUGHT = (
    tuple(color for color in THING_COLORS if color not in NEW_COLORS),
    tuple(p for p in POSITIONS if p not in NEW_PLACES),
)
ASKED = (NEW_COLORS, NEW_PLACES)
TEXT_SEED, PICTURE_SEED, OLD_SEED = 41, 42, 43


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
    for i, (scene, told) in enumerate(islice(taught_scenes(), count)):
        Image.fromarray(render(scene, 256)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(told.text + "\n")
    return folder


def new_prompts(count: int, fresh: int = 0) -> list[Asked]:
    """Of the same kind with every `fresh`; another one makes others, and other noise."""
    scenes = islice(concepts(np.random.default_rng(PICTURE_SEED + fresh), *ASKED), count)
    return [Asked("new", scene, told, 1000 * (1 + fresh) + i) for i, (scene, told) in enumerate(scenes)]


def noun(folder: Path) -> Path:
    """A file with the word: the mean of the six shapes, and as much again that sets it apart from them.

    The mean is a noun to the text encoder. But whatever a layer does linearly to it, it does to the six on average:
    they cannot be told apart. So a direction is added in which the encoder's state of the word, in captions, is as far
    as can be from the states of all other words (Mahalanobis).
    """
    pipe = Cascade.built_in().stages["stage_1"]
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
