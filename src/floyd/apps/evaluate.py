"""How often a picture shows all that its prompt says: fresh prompts, painted, and read by the judge of the scenes.

splits     one        one object
           two        two objects and how one stands to the other
           three      three objects, in a row or anywhere
           held_out   one to three objects, at least one of a colour and shape that never met in training
right      the judge sees everything that the prompt says, and no other thing, in the smallest picture
kept       of the right ones: a larger picture of it shows the same scene

B images  C channels  H height  W width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from floyd.apps.settings import Settings
from floyd.pipelines.cascade import Cascade
from floyd.pipelines.order import merged
from floyd.pipelines.run import stage_seed
from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
from floyd.scenes.captions import Caption, captioned
from floyd.scenes.judge import Reading, Seen, Verdict, read, verdict
from floyd.scenes.render import render
from floyd.scenes.scene import Scene

Picture = npt.NDArray[np.uint8]  # HWC

SPLITS = ("one", "two", "three", "held_out")
EVALUATION = 9_699_690  # the first word of the seed: training begins its own with others
MOST_MOVED = 0.03  # sides of the picture that a thing may move or grow by and still be the same


@dataclass(frozen=True)
class Asked:
    """A prompt, what it was made from, and the seed of its picture."""

    split: str
    scene: Scene
    caption: Caption
    seed: int

    @property
    def prompt(self) -> str:
        return self.caption.text


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture for the judge, and the same as the next stage takes it."""

    picture: Picture
    handed: Any = None


class Painter(Protocol):
    """What is evaluated."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """What it paints, from the smallest on."""

    def draw(self, asked: Sequence[Asked]) -> list[Drawn]:
        """Of the smallest size."""

    def enlarge(self, asked: Sequence[Asked], drawn: Sequence[Drawn], size: int) -> list[Drawn]:
        """To the next size."""


@dataclass(frozen=True, eq=False)
class Answer:
    """One picture, read and held against its prompt; `kept` is by size."""

    asked: Asked
    picture: Picture
    reading: Reading
    verdict: Verdict
    kept: dict[int, bool] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        return self.verdict.everything


@dataclass(frozen=True)
class Share:
    right: int
    of: int

    @classmethod
    def among(cls, claims: Sequence[bool]) -> Share:
        return cls(sum(claims), len(claims))

    @property
    def share(self) -> float | None:
        """None where nothing was counted."""
        return self.right / self.of if self.of else None

    def to_json(self) -> dict[str, Any]:
        return {"right": self.right, "of": self.of, "share": self.share}


@dataclass(frozen=True)
class Score:
    """Pictures that show everything, and of every kind of claim those that hold."""

    everything: Share
    claims: Mapping[str, Share]

    def to_json(self) -> dict[str, Any]:
        return {
            "everything": self.everything.to_json(),
            "claims": {kind: share.to_json() for kind, share in self.claims.items()},
        }


@dataclass(frozen=True)
class Report:
    total: Score
    splits: Mapping[str, Score]
    kept: Mapping[int, Share]

    def to_json(self) -> dict[str, Any]:
        return {
            "total": self.total.to_json(),
            "splits": {split: score.to_json() for split, score in self.splits.items()},
            "kept": {str(size): share.to_json() for size, share in self.kept.items()},
        }


def prompts(num: int, *, seed: int = 0) -> list[Asked]:
    """`num` different prompts, an equal number of each split; the first splits have one more where it does not divide.

    More of them only continues each split: prompt i of a split is the same whatever `num` is.
    """
    if num < 1:
        raise ValueError(f"the number of prompts must be at least 1, got {num}.")
    asked: list[Asked] = []
    for index, split in enumerate(SPLITS):
        count = num // len(SPLITS) + (index < num % len(SPLITS))
        source = _fresh(split, np.random.default_rng((EVALUATION, seed, index)))
        asked += [next(source) for _ in range(count)]
    return asked


def _fresh(split: str, rng: np.random.Generator) -> Iterator[Asked]:
    seen: set[str] = set()
    num_things = {"one": 1, "two": 2, "three": 3}.get(split)
    while True:
        scene, caption = captioned(rng, split="held_out" if split == "held_out" else "train", things=num_things)
        seed = int(rng.integers(2**31))
        if caption.text in seen or (split == "two" and caption.claims.relation is None):
            continue
        seen.add(caption.text)
        yield Asked(split, scene, caption, seed)


def evaluate(
    painter: Painter,
    asked: Sequence[Asked],
    *,
    sizes: Sequence[int] | None = None,
    batch: int = 32,
    on_painted: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Paint, read and judge. `on_painted` hears (size, number of pictures) after every batch.

    `sizes` are the painter's from the smallest on (that one alone by default). Larger pictures are painted of the right
    ones, in batches that are smaller by as much as the side is larger.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}.")
    sizes = check_sizes(painter, sizes)
    answers: list[Answer] = []
    right: list[Drawn] = []
    for part in _parts(asked, batch):
        drawn = painter.draw(part)
        judged = [_judged(one, each.picture) for one, each in zip(part, drawn, strict=True)]
        answers += judged
        if len(sizes) > 1:
            right += [each for each, answer in zip(drawn, judged, strict=True) if answer.is_right]
        if on_painted is not None:
            on_painted(sizes[0], len(part))
    _enlarge(painter, [answer for answer in answers if answer.is_right], right, sizes, batch, on_painted)
    return answers


def check_sizes(painter: Painter, sizes: Sequence[int] | None) -> tuple[int, ...]:
    given = painter.sizes[:1] if sizes is None else tuple(sizes)
    if not given or given != painter.sizes[: len(given)]:
        allowed = ",".join(map(str, painter.sizes))
        raise ValueError(
            f"sizes must be those of the stages from the first on, {allowed}; got {','.join(map(str, given))}."
        )
    return given


def _judged(asked: Asked, picture: Picture) -> Answer:
    reading = read(picture)
    return Answer(asked, picture, reading, verdict(asked.caption.claims, reading))


def _enlarge(
    painter: Painter,
    answers: Sequence[Answer],
    drawn: Sequence[Drawn],
    sizes: tuple[int, ...],
    batch: int,
    on_painted: Callable[[int, int], None] | None,
) -> None:
    """Fills in `kept`. Each picture goes up all sizes before the next one starts: large ones need not be remembered."""
    if len(sizes) < 2:
        return
    at_once = max(1, batch * sizes[0] // sizes[-1])
    for part in _parts(list(zip(answers, drawn, strict=True)), at_once):
        asked = [answer.asked for answer, _ in part]
        larger = [each for _, each in part]
        for size in sizes[1:]:
            larger = painter.enlarge(asked, larger, size)
            for (answer, _), each in zip(part, larger, strict=True):
                answer.kept[size] = is_same_scene(answer.reading, read(each.picture))
            if on_painted is not None:
                on_painted(size, len(part))


def _parts(items: Sequence[Any], size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


def is_same_scene(before: Reading, after: Reading) -> bool:
    """The same things at the same places, and the same background."""
    if before.background != after.background or len(before.things) != len(after.things):
        return False
    return _are_same(before.things, after.things)


def _are_same(some: Sequence[Seen], others: Sequence[Seen]) -> bool:
    """In whatever order. A picture of noise has things by the dozen, so no order is tried that begins wrong."""
    if not some:
        return True
    return any(
        _is_same(some[0], other) and _are_same(some[1:], [*others[:i], *others[i + 1 :]])
        for i, other in enumerate(others)
    )


def _is_same(one: Seen, other: Seen) -> bool:
    moves = (one.x - other.x, one.y - other.y, one.radius - other.radius)
    return (one.shape, one.color) == (other.shape, other.color) and all(abs(move) <= MOST_MOVED for move in moves)


def report(answers: Sequence[Answer], sizes: Sequence[int] = ()) -> Report:
    """The answers, counted. `sizes`: what was asked for, though perhaps nothing was right enough to be enlarged."""
    splits = {
        split: _score([answer for answer in answers if answer.asked.split == split])
        for split in SPLITS
        if any(answer.asked.split == split for answer in answers)
    }
    larger = sorted({*sizes[1:], *(size for answer in answers for size in answer.kept)})
    kept = {size: Share.among([a.kept[size] for a in answers if size in a.kept]) for size in larger}
    return Report(_score(answers), splits, kept)


def _score(answers: Sequence[Answer]) -> Score:
    kinds = answers[0].verdict.claims() if answers else {}
    claims = {
        kind: Share.among([holds for answer in answers for holds in answer.verdict.claims()[kind]]) for kind in kinds
    }
    return Score(Share.among([answer.is_right for answer in answers]), claims)


class CascadePainter:
    """A cascade, painting several prompts at once; the picture of a prompt and a seed is that of `floyd generate`."""

    def __init__(self, cascade: Cascade, settings: Settings | None = None) -> None:
        names = list(cascade.stages)
        told = (settings or Settings()).options(names)
        self._cascade = cascade
        self._options = {name: merged(cascade.presets.get(name, {}), told[name]) for name in names}
        self._name_of = {size: name for name, size in cascade.sizes.items()}

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self._name_of)

    def draw(self, asked: Sequence[Asked]) -> list[Drawn]:
        return self._painted(asked, self.sizes[0])

    def enlarge(self, asked: Sequence[Asked], drawn: Sequence[Drawn], size: int) -> list[Drawn]:
        return self._painted(asked, size, image=torch.stack([each.handed for each in drawn]))

    def _painted(self, asked: Sequence[Asked], size: int, **image: Tensor) -> list[Drawn]:
        name = self._name_of[size]
        stage: Any = self._cascade.stages[name]
        positive, negative = self._text(stage, [one.prompt for one in asked])
        noise = [Generator().manual_seed(stage_seed(one.seed, name)) for one in asked]
        text = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        task = stage.task(**{**self._options[name], **image, **text, "generator": noise})
        *_, last = stage.watch(task)
        finished = stage.finished(last.x_BCHW, colors_BCHW=task.colors)
        pictures = finished.images("pil")
        return [
            Drawn(np.asarray(picture), handed) for picture, handed in zip(pictures, finished.picture_BCHW, strict=True)
        ]

    def _text(self, stage: Any, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        if isinstance(stage, StableDiffusionUpscalePipeline):
            return stage.encode_prompt(texts)
        first: Any = self._cascade.stages["stage_1"]
        encoded: tuple[Tensor, Tensor | None] = first.encode_prompt(texts, clean_caption=True)
        return encoded


class RenderedFirst:
    """A painter whose smallest pictures are the prompts' own scenes, rendered: what its enlarging alone keeps."""

    def __init__(self, painter: Painter) -> None:
        self._painter = painter

    @property
    def sizes(self) -> tuple[int, ...]:
        return self._painter.sizes

    def draw(self, asked: Sequence[Asked]) -> list[Drawn]:
        pictures = [render(one.scene, self.sizes[0]) for one in asked]
        return [Drawn(picture, torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1) for picture in pictures]

    def enlarge(self, asked: Sequence[Asked], drawn: Sequence[Drawn], size: int) -> list[Drawn]:
        return self._painter.enlarge(asked, drawn, size)
