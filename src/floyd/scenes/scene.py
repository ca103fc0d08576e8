"""What a scene is: one to three coloured shapes on a background, and how scenes are drawn by lot.

Lengths (x, y, radius) are in sides of the picture, 0..1; x grows to the right, y grows downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Color = npt.NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NEW_SHAPES = ("crescent",)  # that the built-in model never saw, to be taught to it
SIZES = ("small", "large")
RADII = {"small": (0.11, 0.13), "large": (0.20, 0.22)}
RELATIONS = ("left of", "right of", "above", "below")
REVERSED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

RGB = {  # uint8, 0..255; any two differ by at least 90 in Euclidean distance
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (30, 70, 220),
    "yellow": (250, 220, 40),
    "orange": (245, 130, 20),
    "purple": (130, 30, 170),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "pink": (255, 150, 190),
    "cyan": (90, 215, 230),
    "brown": (115, 70, 35),
}
THING_COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
BACKGROUND_COLORS = ("white", "black", "gray", "pink", "cyan", "brown", "blue", "yellow")

HELD_OUT = frozenset({  # (color, shape), never drawn for training
    ("red", "triangle"),
    ("green", "ring"),
    ("blue", "star"),
    ("yellow", "cross"),
    ("purple", "square"),
})  # fmt: skip
SPLITS = ("train", "held_out", "any")

MARGIN = 0.02  # between a thing and the edge of the picture
GAP = 0.04  # between two things
CONTRAST = 95.0  # least RGB distance (0..255 scale) of a thing from every colour of its background
SPAN = 150.0  # least RGB distance of the two ends of a gradient

_COUNT_SHARES = (0.35, 0.45, 0.20)  # of scenes with one, two, three things
_GRADIENT_SHARE = 0.25
_ARRANGED_SHARE = {1: 0.6, 2: 0.9, 3: 0.6}  # of scenes with a position, a relation, a row
_STRAY = 0.02  # how far a thing may stand from where it belongs, along each axis
_LOOSE_STRAY = 0.05  # of a single thing of which no place is said
_THIRDS = (0.22, 0.5, 0.78)
_TRIANGLE = ((0.5, 0.26), (0.27, 0.72), (0.73, 0.72))  # three things that are in no row: (x, y) by order


def _one_of(value: str | None, name: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


@dataclass(frozen=True)
class Thing:
    """One coloured shape; it fits the square of half-side `radius` around (x, y)."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        _one_of(self.shape, "shape", SHAPES + NEW_SHAPES)
        _one_of(self.color, "color", tuple(RGB))
        _one_of(self.size, "size", SIZES)
        if not (self.radius > 0 and math.isfinite(self.x) and math.isfinite(self.y)):
            raise ValueError(f"a thing needs finite x, y and a radius above 0, got {self.x}, {self.y}, {self.radius}.")


@dataclass(frozen=True)
class Background:
    """One colour, or a linear gradient from `color` (top or left) to `second_color` (bottom or right)."""

    kind: str = "plain"
    color: str = "white"
    second_color: str | None = None
    direction: str = "vertical"

    def __post_init__(self) -> None:
        _one_of(self.kind, "kind", ("plain", "gradient"))
        _one_of(self.color, "color", tuple(RGB))
        _one_of(self.direction, "direction", ("vertical", "horizontal"))
        if self.kind == "gradient":
            _one_of(self.second_color, "second_color", tuple(RGB))
        elif self.second_color is not None:
            raise ValueError(f"a plain background has no second_color, got {self.second_color!r}; use kind='gradient'.")


@dataclass(frozen=True)
class Scene:
    """Things on a background, and the arrangement they were placed by, if any.

    position  of the only thing: a ninth of the picture, one of POSITIONS
    relation  of things[0] to things[1], one of RELATIONS
    row       things are in a row, listed from left to right
    """

    things: tuple[Thing, ...]
    background: Background
    position: str | None = None
    relation: str | None = None
    row: bool = False

    def __post_init__(self) -> None:
        if self.position is not None:
            _one_of(self.position, "position", POSITIONS)
        if self.relation is not None:
            _one_of(self.relation, "relation", RELATIONS)
        wanted = 1 if self.position else 2 if self.relation else 3 if self.row else len(self.things)
        if len(self.things) != wanted:
            raise ValueError(
                f"a position needs 1 thing, a relation 2, a row 3; got {len(self.things)} things with "
                f"position={self.position!r}, relation={self.relation!r}, row={self.row}."
            )


def color_255(name: str) -> Color:
    """The colour on the scale 0..255, float32."""
    _one_of(name, "color", tuple(RGB))
    return np.asarray(RGB[name], np.float32)


def position_of(x: float, y: float) -> str:
    """The ninth of the picture that holds the point."""
    column, row = (min(max(int(3 * value), 0), 2) for value in (x, y))
    return POSITIONS[3 * row + column]


def relation_between(x: float, y: float, other_x: float, other_y: float) -> str:
    """How the first point stands to the other, by the axis along which they are further apart."""
    dx, dy = x - other_x, y - other_y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


@cache
def _contrasts(color: str, start: str, end: str) -> bool:
    """Whether the colour keeps its distance from all colours between start and end."""
    point, first, last = (color_255(name).astype(float) for name in (color, start, end))
    along = last - first
    length = float(along @ along)
    t = 0.0 if length == 0 else min(max(float((point - first) @ along) / length, 0.0), 1.0)
    return float(np.linalg.norm(point - first - t * along)) >= CONTRAST


@cache
def backgrounds_for(colors: frozenset[str], kind: str) -> tuple[tuple[str, str], ...]:
    """The (start, end) colours that things of these colours can be seen on; start is end for a plain background."""
    if kind == "plain":
        pairs = [(name, name) for name in BACKGROUND_COLORS]
    else:
        pairs = [
            (start, end)
            for start, end in permutations(BACKGROUND_COLORS, 2)
            if float(np.linalg.norm(color_255(start) - color_255(end))) >= SPAN
        ]
    return tuple(pair for pair in pairs if all(_contrasts(color, *pair) for color in colors))


@cache
def _looks(split: str) -> tuple[tuple[str, str], ...]:
    every = [(color, shape) for color in THING_COLORS for shape in SHAPES]
    if split == "any":
        return tuple(every)
    return tuple(look for look in every if (look in HELD_OUT) == (split == "held_out"))


def sample_scene(rng: np.random.Generator, *, split: str = "train", things: int | None = None) -> Scene:
    """Draws a scene by lot.

    train     no thing is of a held-out pair of colour and shape
    held_out  at least one thing is
    any       all pairs alike
    """
    _one_of(split, "split", SPLITS)
    if things not in (None, 1, 2, 3):
        raise ValueError(f"things must be 1, 2, 3 or None (by lot), got {things!r}.")
    num_things = things or 1 + int(np.searchsorted(np.cumsum(_COUNT_SHARES)[:2], rng.random(), side="right"))
    looks = _sample_looks(rng, split, num_things)
    background = _sample_background(rng, frozenset(color for color, _ in looks))
    is_arranged = rng.random() < _ARRANGED_SHARE[num_things]
    position = relation = None
    if num_things == 1:
        position = _pick(rng, POSITIONS) if is_arranged else None
        sizes, spots = _place_one(rng, position)
    elif is_arranged:
        relation = _pick(rng, RELATIONS) if num_things == 2 else None
        sizes, spots = _place_in_line(rng, num_things, relation or "left of")
    elif num_things == 2:
        sizes, spots = _place_in_line(rng, 2, "left of")
    else:
        sizes, spots = _place_in_triangle(rng)
    placed = tuple(
        Thing(shape, color, size, *spot) for (color, shape), size, spot in zip(looks, sizes, spots, strict=True)
    )
    return Scene(placed, background, position, relation, row=num_things == 3 and is_arranged)


Option = TypeVar("Option")
Spot = tuple[float, float, float]  # x, y, radius


def _pick(rng: np.random.Generator, options: tuple[Option, ...]) -> Option:
    return options[int(rng.integers(len(options)))]


def _sample_looks(rng: np.random.Generator, split: str, count: int) -> list[tuple[str, str]]:
    """Pairs of colour and shape, no two alike."""
    looks = [_pick(rng, _looks(split))]
    while len(looks) < count:
        look = _pick(rng, _looks("train" if split == "train" else "any"))
        if look not in looks:
            looks.append(look)
    return [looks[int(i)] for i in rng.permutation(count)] if split == "held_out" else looks


def _sample_background(rng: np.random.Generator, colors: frozenset[str]) -> Background:
    if rng.random() < _GRADIENT_SHARE and (gradients := backgrounds_for(colors, "gradient")):
        return Background("gradient", *_pick(rng, gradients))  # from top to bottom: captions do not say
    return Background("plain", _pick(rng, backgrounds_for(colors, "plain"))[0])


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _sample_size(rng: np.random.Generator, large_share: float = 0.5) -> str:
    return "large" if rng.random() < large_share else "small"


def _near(rng: np.random.Generator, place: float, radius: float, stray: float = _STRAY) -> float:
    """By lot around the place, within the picture."""
    low, high = radius + MARGIN, 1 - radius - MARGIN
    return min(max(place + _between(rng, -stray, stray), low), high)


def _place_one(rng: np.random.Generator, position: str | None) -> tuple[list[str], list[Spot]]:
    """In the middle of the picture, or of a ninth of it."""
    size = _sample_size(rng)
    radius = _between(rng, *RADII[size])
    row, column = (1, 1) if position is None else divmod(POSITIONS.index(position), 3)
    stray = _LOOSE_STRAY if position is None else _STRAY
    x, y = (_near(rng, _THIRDS[third], radius, stray) for third in (column, row))
    return [size], [(x, y, radius)]


def _place_in_line(rng: np.random.Generator, count: int, relation: str) -> tuple[list[str], list[Spot]]:
    """Boxes apart along one axis through the middle, the room between them and at the ends shared out evenly."""
    sizes = [_sample_size(rng, 0.5 if count == 2 else 0.2) for _ in range(count)]
    while True:
        radii = [_between(rng, *RADII[size]) for size in sizes]
        room = (1 - 2 * sum(radii)) / (count + 1)
        if room > GAP:
            break
        sizes[sizes.index("large")] = "small"
    stray = min(_STRAY, (room - GAP) / 2)
    along, start = [], 0.0
    for radius in radii:
        along.append(_near(rng, start + room + radius, radius, stray))
        start += room + 2 * radius
    across = [_near(rng, 0.5, radius) for radius in radii]
    if relation in ("right of", "below"):
        along = [1 - value for value in along]
    columns, rows = (across, along) if relation in ("above", "below") else (along, across)
    return sizes, list(zip(columns, rows, radii, strict=True))


def _place_in_triangle(rng: np.random.Generator) -> tuple[list[str], list[Spot]]:
    """The first above, the second and the third below it from left to right."""
    sizes = ["small"] * 3
    if rng.random() < 0.5:
        sizes[int(rng.integers(3))] = "large"
    radii = [_between(rng, *RADII[size]) for size in sizes]
    return sizes, [(_near(rng, x, r), _near(rng, y, r), r) for (x, y), r in zip(_TRIANGLE, radii, strict=True)]
