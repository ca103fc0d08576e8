"""Reads a picture back into shapes, colours and places, and holds a caption's claims against what it read.

H height  W width; colours are RGB, 0..255; a cover is the share of each pixel that a thing covers, 0..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, permutations

import numpy as np
import numpy.typing as npt

from floyd.scenes.captions import Claims, ThingClaim
from floyd.scenes.regions import Array, Mask, fitted_background, labelled, reduced, standing_out, widened
from floyd.scenes.render import (
    CROSS_HALF_LENGTH,
    CROSS_HALF_WIDTH,
    RING_HOLE,
    SQUARE_HALF_SIDE,
    STAR_NOTCH,
    TRIANGLE_HALF_HEIGHT,
    coverage,
)
from floyd.scenes.scene import RADII, RGB, SHAPES, SPAN, position_of, relation_between

UNKNOWN = "unknown"
LEAST_SIDE = 48
LEAST_AREA = 8 / 64**2  # smaller specks are no things
LEAST_MATCH = 0.84  # overlap (intersection over union) with the best template
GOOD_MATCH = 0.90  # below, a soft outline is allowed for
FARTHEST_COLOR = 65.0  # RGB distance from the table's nearest colour
SIZE_BORDER = sum(sum(bounds) for bounds in RADII.values()) / 4
ROW_STRAY = 0.2  # how far the things of a row may differ in height
MOST_SEEN = 6  # of things that claims are held against, the largest first


def _cross_spread() -> float:
    long, wide = CROSS_HALF_LENGTH, CROSS_HALF_WIDTH
    arms, middle = 4 * long * wide, 4 * wide * wide  # areas
    return (2 * arms * (long**2 + wide**2) - middle * 2 * wide**2) / (3 * (2 * arms - middle))


_AREAS = {  # in squared radii
    "circle": math.pi,
    "ring": math.pi * (1 - RING_HOLE**2),
    "square": 4 * SQUARE_HALF_SIDE**2,
    "triangle": 2 * TRIANGLE_HALF_HEIGHT,
    "star": 5 * STAR_NOTCH * math.sin(math.radians(36)),
    "cross": 8 * CROSS_HALF_LENGTH * CROSS_HALF_WIDTH - 4 * CROSS_HALF_WIDTH**2,
}
_SPREADS = {  # mean square distance from the centre of mass, in squared radii
    "circle": 1 / 2,
    "ring": (1 + RING_HOLE**2) / 2,
    "square": 2 * SQUARE_HALF_SIDE**2 / 3,
    "triangle": 1 / 3,
    "star": (1 + STAR_NOTCH**2 + STAR_NOTCH * math.cos(math.radians(36))) / 6,
    "cross": _cross_spread(),
}
_DROP = {"triangle": TRIANGLE_HALF_HEIGHT / 3}  # of the centre of mass below (x, y), in radii


@dataclass(frozen=True)
class Seen:
    """One thing read from a picture; `match` is the overlap with the shape's template, 0..1."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    match: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows: things from the largest to the smallest, and the background as captions claim it."""

    things: tuple[Seen, ...]
    background: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Which claims hold; the tuples have an entry for each claim that was made, in order of mention."""

    count: bool
    shapes: tuple[bool, ...]
    colors: tuple[bool, ...]
    sizes: tuple[bool, ...]
    positions: tuple[bool, ...]
    relation: tuple[bool, ...]
    background: tuple[bool, ...]

    @property
    def everything(self) -> bool:
        """The picture shows all that the prompt says, and no other thing."""
        return self.count and all(all(held) for held in self.claims().values())

    def claims(self) -> dict[str, tuple[bool, ...]]:
        """Every claim by its kind."""
        return {
            "count": (self.count,),
            "shapes": self.shapes,
            "colors": self.colors,
            "sizes": self.sizes,
            "positions": self.positions,
            "relation": self.relation,
            "background": self.background,
        }


@dataclass(frozen=True)
class _Form:
    """Where a shape's mass is, in radii."""

    area: float
    spread: float  # mean square distance from the centre of mass
    drop: float  # of the centre of mass below (x, y)


@cache
def _form(shape: str) -> _Form:
    if shape in _AREAS:
        return _Form(_AREAS[shape], _SPREADS[shape], _DROP.get(shape, 0.0))
    fine = 200  # pixels to a radius; symmetric from left to right
    at_W = np.arange(-fine - 1, fine + 1, dtype=np.float32) + np.float32(0.5)
    cover_HW = coverage(shape, at_W[None, :], at_W[:, None], fine).astype(np.float64)
    mass, at_W = float(cover_HW.sum()), at_W / fine
    drop = float(cover_HW.sum(1) @ at_W) / mass
    spread = float(cover_HW.sum(0) @ at_W**2 + cover_HW.sum(1) @ (at_W - drop) ** 2) / mass
    return _Form(mass / fine**2, spread, drop)


def read(picture: npt.NDArray[np.uint8], *, shapes: tuple[str, ...] = SHAPES) -> Reading:
    """What the picture shows; square, uint8 RGB, at least 48 pixels wide. `shapes` are those that it may show."""
    is_square = picture.ndim == 3 and picture.shape[2] == 3 and picture.shape[0] == picture.shape[1]
    if picture.dtype != np.uint8 or not is_square or picture.shape[0] < LEAST_SIDE:
        raise ValueError(
            f"picture must be uint8 of H x H x 3 with H >= {LEAST_SIDE}, got {picture.dtype} of {picture.shape}."
        )
    colors_HWC = reduced(picture)
    background_HWC, plane = fitted_background(colors_HWC)
    side = colors_HWC.shape[0]
    difference_HW = np.sqrt(((colors_HWC - background_HWC) ** 2).sum(-1))
    labels_HW, count = labelled(standing_out(difference_HW))
    areas = np.bincount(labels_HW.ravel(), minlength=count + 1)
    labels = [label for label in range(1, count + 1) if areas[label] >= LEAST_AREA * side**2]
    labels.sort(key=lambda label: -areas[label])
    things = [_read_thing(colors_HWC, background_HWC, labels_HW, label, shapes) for label in labels]
    return Reading(tuple(things), _read_background(plane))


def _read_background(plane: Array) -> tuple[str, ...]:
    """Plain, or a gradient along the axis that changes more."""
    center, per_axis = plane[0], plane[1:]
    change = per_axis[int(np.argmax(np.linalg.norm(per_axis, axis=1)))]
    if float(np.linalg.norm(change)) < SPAN / 2:
        return ("plain", nearest_color(center))
    return ("gradient", nearest_color(center - change / 2), nearest_color(center + change / 2))


def nearest_color(color: npt.NDArray[np.floating]) -> str:
    """The name of the table's nearest colour, if it is anywhere near."""
    distance, name = min((math.dist(RGB[name], color.tolist()), name) for name in RGB)
    return name if distance <= FARTHEST_COLOR else UNKNOWN


def _read_thing(
    colors_HWC: Array, background_HWC: Array, labels_HW: npt.NDArray[np.intp], label: int, shapes: tuple[str, ...]
) -> Seen:
    side = colors_HWC.shape[0]
    rows, columns = np.nonzero(labels_HW == label)
    top, left = max(int(rows.min()) - 3, 0), max(int(columns.min()) - 3, 0)
    window = (slice(top, int(rows.max()) + 4), slice(left, int(columns.max()) + 4))
    own_HW = labels_HW[window] == label
    others_HW = (labels_HW[window] != label) & (labels_HW[window] != 0)
    color, cover_HW = _cover(colors_HWC[window], background_HWC[window], own_HW, others_HW)
    fit = _best_shape(cover_HW, shapes)
    behind = background_HWC[window][own_HW].mean(0)
    return Seen(
        fit.shape if fit.match >= LEAST_MATCH else UNKNOWN,
        nearest_color(behind + (color - behind) * np.float32(fit.strength)),
        "large" if fit.radius / side > SIZE_BORDER else "small",
        (left + fit.x) / side,
        (top + fit.y) / side,
        fit.radius / side,
        fit.match,
    )


def _cover(colors_HWC: Array, background_HWC: Array, own_HW: Mask, others_HW: Mask) -> tuple[Array, Array]:
    """The thing's colour, and its cover: how far each pixel has gone from the background to that colour."""
    core_HW = ~widened(~own_HW)
    if core_HW.sum() < 4:
        core_HW = own_HW
    color: Array = np.median(colors_HWC[core_HW], axis=0)
    way_HWC = color - background_HWC
    gone_HWC = colors_HWC - background_HWC
    cover_HW = np.clip((gone_HWC * way_HWC).sum(-1) / np.maximum((way_HWC**2).sum(-1), 1.0), 0, 1.5)
    stray_HW = np.sqrt(((gone_HWC - cover_HW[..., None] * way_HWC) ** 2).sum(-1))
    around_HW = widened(widened(own_HW)) & (own_HW | ~widened(others_HW))
    return color, np.where(around_HW & (stray_HW < 70), cover_HW, 0).astype(np.float32)


@dataclass(frozen=True)
class _Fit:
    """A template laid over a cover; `strength` is the cover of its fully covered pixels."""

    shape: str
    x: float
    y: float
    radius: float
    strength: float
    match: float


def _best_shape(cover_HW: Array, shapes: tuple[str, ...]) -> _Fit:
    """The template that overlaps most, in pixels of the window.

    Area and centre of mass, which blur does not change, place each template; it is tried sharp and blurred. Where
    blur took away the pure colour of thin shapes, the cover is too strong: then area and spread place the template.
    """
    height, width = cover_HW.shape
    mass = max(float(cover_HW.sum()), 1e-6)
    x_W, y_H = np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32) + 0.5
    x, y = float(cover_HW.sum(0) @ x_W) / mass, float(cover_HW.sum(1) @ y_H) / mass
    by_area = (_fit(cover_HW, shape, x, y, math.sqrt(mass / _form(shape).area), 1.0, (0, 1, 2)) for shape in shapes)
    best = max(by_area, key=lambda fit: fit.match)
    if best.match >= GOOD_MATCH:
        return best
    spread = float(cover_HW.sum(0) @ (x_W - x) ** 2 + cover_HW.sum(1) @ (y_H - y) ** 2) / mass
    soft = [best]
    for shape in shapes:
        for blurs in range(4):
            radius = math.sqrt(max(spread - blurs, 1.0) / _form(shape).spread)  # each blur spreads by a square pixel
            strength = mass / (_form(shape).area * radius**2)
            if 0.95 <= strength <= 1.7:
                soft.append(_fit(cover_HW / np.float32(strength), shape, x, y, radius, strength, (blurs,)))
    return max(soft, key=lambda fit: fit.match)


def _fit(
    cover_HW: Array, shape: str, x: float, y: float, radius: float, strength: float, blurs: tuple[int, ...]
) -> _Fit:
    """The template with its centre of mass at (x, y), blurred as often as fits best."""
    height, width = cover_HW.shape
    y -= radius * _form(shape).drop
    x_1W = (np.arange(width, dtype=np.float32) + np.float32(0.5 - x))[None, :]
    y_H1 = (np.arange(height, dtype=np.float32) + np.float32(0.5 - y))[:, None]
    template_HW = coverage(shape, x_1W, y_H1, radius)
    match = 0.0
    for num_blurred in range(blurs[-1] + 1):
        if num_blurred:
            template_HW = _blurred(template_HW)
        if num_blurred in blurs:
            overlap = np.minimum(template_HW, cover_HW).sum() / np.maximum(template_HW, cover_HW).sum()
            match = max(match, float(overlap))
    return _Fit(shape, x, y, radius, strength, match)


def _blurred(values_HW: Array) -> Array:
    padded = np.pad(values_HW, 1)
    rows = (padded[:-2] + padded[2:]) / 4 + padded[1:-1] / 2
    return np.asarray((rows[:, :-2] + rows[:, 2:]) / 4 + rows[:, 1:-1] / 2, np.float32)


def verdict(claims: Claims, reading: Reading) -> Verdict:
    """Holds the claims against the things seen, each claimed thing paired with the seen one that suits all best."""
    seen: list[Seen | None] = list(reading.things[:MOST_SEEN])
    seen += [None] * max(claims.count - len(seen), 0)
    verdicts = (_verdict(claims, reading, pairing) for pairing in permutations(seen, claims.count))
    return max(verdicts, key=lambda each: sum(sum(held) for held in each.claims().values()))


def _verdict(claims: Claims, reading: Reading, pairing: tuple[Seen | None, ...]) -> Verdict:
    pairs = list(zip(claims.things, pairing, strict=True))
    return Verdict(
        count=len(reading.things) == claims.count,
        shapes=tuple(seen is not None and seen.shape == thing.shape for thing, seen in pairs),
        colors=tuple(seen is not None and seen.color == thing.color for thing, seen in pairs),
        sizes=tuple(seen is not None and seen.size == thing.size for thing, seen in pairs if thing.size),
        positions=tuple(_is_in_place(thing, seen) for thing, seen in pairs if thing.position),
        relation=_relation_holds(claims, pairing),
        background=(reading.background == claims.background,) if claims.background else (),
    )


def _is_in_place(thing: ThingClaim, seen: Seen | None) -> bool:
    return seen is not None and position_of(seen.x, seen.y) == thing.position


def _relation_holds(claims: Claims, pairing: tuple[Seen | None, ...]) -> tuple[bool, ...]:
    """Of the relation of two, or of the row; nothing where neither is claimed."""
    if claims.relation is None and not claims.row:
        return ()
    seen = [one for one in pairing if one is not None]
    if len(seen) < claims.count:
        return (False,)
    if claims.relation is not None:
        first, word, second = claims.relation
        return (relation_between(seen[first].x, seen[first].y, seen[second].x, seen[second].y) == word,)
    heights = [one.y for one in seen]
    in_order = all(a.x < b.x for a, b in pairwise(seen))
    return (in_order and max(heights) - min(heights) < ROW_STRAY,)
