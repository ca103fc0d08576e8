"""What a caption says of a scene: first the claims, then the words, so that a prompt can be checked without parsing.

sample_scene -> claims_of -> worded -> Caption
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from floyd.scenes.scene import REVERSED, Background, Scene, sample_scene

SIZE_SAID = 0.8
BACKGROUND_SAID = 0.9
ARRANGEMENT_SAID = 0.95  # of the scenes that have one; with nine tenths of the pairs related, 85 % of pairs
SWAPPED = 0.5  # order of mention

SIZE_WORDS = {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")}
NOUNS = {
    "circle": ("circle", "disc", "disk"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "crescent": ("zorp",),  # a word that the built-in model never read
}
COLOR_WORDS = {"gray": ("gray", "grey")}
BACKDROPS = ("background", "background", "backdrop")
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
POSITION_WORDS = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "center": ("in the center", "in the middle"),
    "top left": ("in the top left", "in the top left corner", "in the upper left"),
    "top right": ("in the top right", "in the top right corner", "in the upper right"),
    "bottom left": ("in the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom right": ("in the bottom right", "in the bottom right corner", "in the lower right"),
}


@dataclass(frozen=True)
class ThingClaim:
    """One thing that the caption mentions; None where it says nothing."""

    shape: str
    color: str
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Claims:
    """All that a caption says, in its own order of mention.

    relation    (i, word, j): things[i] stands so to things[j], word is one of scene.RELATIONS
    row         the things are in a row, in this order from left to right
    background  ("plain", color) or ("gradient", from, to); from the top or from the left
    """

    things: tuple[ThingClaim, ...]
    relation: tuple[int, str, int] | None = None
    row: bool = False
    background: tuple[str, ...] | None = None

    @property
    def count(self) -> int:
        return len(self.things)


@dataclass(frozen=True)
class Caption:
    """The words, where its nouns stand, and what it claims.

    nouns  (start, end, thing_index): text[start:end] names scene.things[thing_index]; a thing may be named twice
    """

    text: str
    nouns: tuple[tuple[int, int, int], ...]
    claims: Claims


def captioned(rng: np.random.Generator, *, split: str = "train", things: int | None = None) -> tuple[Scene, Caption]:
    """A scene and a caption of it, both by lot."""
    scene = sample_scene(rng, split=split, things=things)
    return scene, caption(scene, rng)


def caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption of the scene by lot: what is said, in which order, in which words."""
    claims, order = _chosen(scene, rng)
    text, nouns = worded(claims, rng)
    return Caption(text, tuple((start, end, order[mention]) for start, end, mention in nouns), claims)


def facts(scene: Scene) -> Claims:
    """All that could be said of the scene."""
    return _claims(scene, range(len(scene.things)), lambda _: True)


def claims_of(scene: Scene, rng: np.random.Generator) -> Claims:
    """What one caption by lot says of the scene."""
    return _chosen(scene, rng)[0]


def _chosen(scene: Scene, rng: np.random.Generator) -> tuple[Claims, list[int]]:
    """The claims, and which thing of the scene each mention is."""
    order = list(range(len(scene.things)))
    is_free = len(scene.things) > 1 and scene.relation is None  # where nothing is said, the order says where things are
    if not is_free and rng.random() < SWAPPED:
        order = order[1:] + order[:1]
    return _claims(scene, order, lambda share: rng.random() < share), order


def _claims(scene: Scene, order: Sequence[int], says: Callable[[float], bool]) -> Claims:
    things = []
    for thing in (scene.things[index] for index in order):
        size = thing.size if says(SIZE_SAID) else None
        position = scene.position if scene.position and says(ARRANGEMENT_SAID) else None
        things.append(ThingClaim(thing.shape, thing.color, size, position))
    relation = None
    if scene.relation and says(ARRANGEMENT_SAID):
        relation = (0, scene.relation if order[0] == 0 else REVERSED[scene.relation], 1)
    return Claims(
        tuple(things),
        relation,
        row=scene.row and says(ARRANGEMENT_SAID),
        background=_background_claim(scene.background) if says(BACKGROUND_SAID) else None,
    )


def _background_claim(background: Background) -> tuple[str, ...]:
    if background.second_color is None:
        return ("plain", background.color)
    return ("gradient", background.color, background.second_color)


def worded(claims: Claims, rng: np.random.Generator | None = None) -> tuple[str, tuple[tuple[int, int, int], ...]]:
    """The claims in words, and (start, end, mention) of each noun; without `rng` the plainest wording."""
    pick = _Pick(rng)
    pieces = _sentence(claims, pick)
    text, nouns = "", []
    for piece in pieces:
        if isinstance(piece, _Noun):
            nouns.append((len(text), len(text) + len(piece.word), piece.mention))
            text += piece.word
        else:
            text += piece
    return text, tuple(nouns)


@dataclass(frozen=True)
class _Noun:
    word: str
    mention: int


_Pieces = list["str | _Noun"]


class _Pick:
    """One of several wordings: by lot, or always the first."""

    def __init__(self, rng: np.random.Generator | None) -> None:
        self._rng = rng

    def __call__(self, *options: str) -> str:
        return options[0] if self._rng is None else options[int(self._rng.integers(len(options)))]

    def color(self, name: str) -> str:
        return self(*COLOR_WORDS.get(name, (name,)))


def _filled(template: str, slots: dict[str, _Pieces]) -> _Pieces:
    """The template with its {slots} filled in."""
    pieces: _Pieces = []
    for index, part in enumerate(template.replace("}", "{").split("{")):
        pieces += slots[part] if index % 2 else [part]
    return pieces


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _thing(thing: ThingClaim, mention: int, pick: _Pick) -> _Pieces:
    """ "a large red circle"."""
    words = f"{pick.color(thing.color)} "
    if thing.size:
        words = f"{pick(*SIZE_WORDS[thing.size])} {words}"
    return [_with_article(words), _Noun(pick(*NOUNS[thing.shape]), mention)]


def _again(claims: Claims, named: _Pieces, pick: _Pick) -> _Pieces:
    """A second mention, by what tells the two apart: "the circle", "the red circle"."""
    noun = named[-1]
    assert isinstance(noun, _Noun)
    thing = claims.things[noun.mention]
    is_shape_shared = sum(other.shape == thing.shape for other in claims.things) > 1
    return [f"the {pick.color(thing.color)} " if is_shape_shared else "the ", noun]


def _sentence(claims: Claims, pick: _Pick) -> _Pieces:
    things = _arrangement(claims, pick)
    if claims.background is None:
        return things
    on, short = _background_words(claims.background, pick)
    template = pick("{things} " + on, "{things} " + on, on + ", {things}", "{things}, " + short)
    return _filled(template, {"things": things})


def _background_words(background: tuple[str, ...], pick: _Pick) -> tuple[str, str]:
    """As in "a circle on white" and as in "a circle, white behind"."""
    backdrop = pick(*BACKDROPS)
    if background[0] == "plain":
        ground = f"{pick.color(background[1])} {backdrop}"
        on = f"{pick('on', 'on', 'against')} {_with_article(ground)}"
        return on, pick(ground, f"the {backdrop} is {pick.color(background[1])}")
    first, last = (pick.color(name) for name in background[1:])
    on = pick(
        f"on a gradient from {first} to {last}",
        f"on a {backdrop} that fades from {first} to {last}",
        f"on {_with_article(first)} to {last} gradient",
    )
    return on, pick(f"{first} to {last} gradient {backdrop}", f"the {backdrop} fades from {first} to {last}")


def _arrangement(claims: Claims, pick: _Pick) -> _Pieces:
    if not 1 <= claims.count <= 3:
        raise ValueError(f"a caption mentions one to three things, got {claims.count}.")
    slots = {"abc"[mention]: _thing(thing, mention, pick) for mention, thing in enumerate(claims.things)}
    if claims.count == 1:
        position = claims.things[0].position
        return _filled(_one(pick, pick(*POSITION_WORDS[position]) if position else None), slots)
    if claims.relation is not None:
        return _related(claims, slots, pick)
    listed = "{a} and {b}" if claims.count == 2 else pick("{a}, {b} and {c}", "{a}, {b} and {c}", "{a} and {b} and {c}")
    if claims.row:
        template = pick("{} in a row", "from left to right, {}", "in a row from left to right, {}", "a row of {}")
    else:
        number = ("two", "three")[claims.count - 2]
        noun = pick("shapes", "things")
        options = ["{}", f"there are {number} {noun}, {{}}", f"{number} {noun}: {{}}", "there is {}", "a picture of {}"]
        template = pick("{}", *options)
    return _filled(template.replace("{}", listed), slots)


def _one(pick: _Pick, position: str | None) -> str:
    if position is None:
        return pick("{a}", "{a}", "there is {a}", "a picture of {a}", "one shape: {a}")
    return pick(
        f"{{a}} {position}",
        f"{{a}} {position}",
        f"there is {{a}} {position}",
        f"{position} there is {{a}}",
        f"{position}, {{a}}",
        f"a picture of {{a}} {position}",
    )


def _related(claims: Claims, slots: dict[str, _Pieces], pick: _Pick) -> _Pieces:
    """Things in the order of mention; the relation is said of whichever is its subject."""
    assert claims.relation is not None
    subject, word, other = claims.relation
    subject_slot, other_slot = "abc"[subject], "abc"[other]
    how = pick(*RELATION_WORDS[word])
    again = [_again(claims, slots[slot], pick) for slot in (subject_slot, other_slot)]
    slots = slots | {"the_subject": again[0], "the_other": again[1]}
    template = pick(
        f"{{{subject_slot}}} {how} {{{other_slot}}}",
        f"{{{subject_slot}}} {how} {{{other_slot}}}",
        f"{{{subject_slot}}} {how} {{{other_slot}}}",
        f"{{{subject_slot}}} is {how} {{{other_slot}}}",
        f"there is {{{subject_slot}}} {how} {{{other_slot}}}",
        f"{how} {{{other_slot}}} is {{{subject_slot}}}",
        f"two shapes: {{{subject_slot}}} {how} {{{other_slot}}}",
        f"{{a}} and {{b}}, {{the_subject}} is {how} {{the_other}}",
    )
    return _filled(template, slots)
