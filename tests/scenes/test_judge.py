"""The judge reads what was drawn, at every size, and notices each thing that is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from floyd.scenes.captions import Claims, ThingClaim, facts
from floyd.scenes.judge import UNKNOWN, Reading, Seen, Verdict, read, verdict
from floyd.scenes.render import render
from floyd.scenes.scene import GAP, RGB, SHAPES, Background, Scene, Thing, sample_scene

TWO = Scene(
    (Thing("circle", "red", "large", 0.3, 0.3, 0.22), Thing("ring", "blue", "small", 0.36, 0.75, 0.11)),
    Background("plain", "white"),
    relation="above",
)
ONE = Scene((Thing("star", "yellow", "small", 0.2, 0.2, 0.11),), Background("plain", "blue"), position="top left")
ROW = Scene(
    tuple(Thing("cross", color, "small", x, 0.5, 0.1) for color, x in (("red", 0.2), ("green", 0.5), ("white", 0.8))),
    Background("gradient", "black", "gray"),
    row=True,
)


def judged(claimed: Scene, drawn: Scene, size: int = 64) -> Verdict:
    return verdict(facts(claimed), read(render(drawn, size)))


def disturbed(scene: Scene, size: int, rng: np.random.Generator, *, blur: float) -> np.ndarray:
    """As a model might paint it: soft edges, noise of 4/255, each colour off by up to 12/255."""
    shifted = {name: np.clip(np.array(color) + rng.integers(-12, 13, 3), 0, 255) for name, color in RGB.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, color in shifted.items():
            patch.setitem(RGB, name, tuple(color))
        picture = render(scene, size).astype(np.float32)
    taps = np.exp(-(np.arange(-4, 5) ** 2) / (2 * blur**2))
    for axis in (0, 1):
        padded = np.pad(picture, [(4, 4) if axis == other else (0, 0) for other in range(3)], mode="edge")
        shifts = (np.take(padded, range(tap, tap + size), axis) for tap in range(9))
        picture = sum(weight * shift for weight, shift in zip(taps / taps.sum(), shifts, strict=True))
    return np.clip(np.rint(picture + 4 * rng.standard_normal(picture.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("size", "count"), [(48, 60), (64, 300), (100, 30), (256, 100), (1024, 30)])
def test_freshly_drawn_scenes_are_read_right(size, count):
    rng = np.random.default_rng(size)
    scenes = [sample_scene(rng, split="any") for _ in range(count)]
    assert np.mean([judged(scene, scene, size).everything for scene in scenes]) >= 0.99


@pytest.mark.parametrize("blur", [0.6, 1.0])
def test_soft_noisy_discolored_pictures_are_read_right(blur):
    rng = np.random.default_rng(7)
    scenes = [sample_scene(rng, split="any") for _ in range(100)]
    verdicts = [verdict(facts(scene), read(disturbed(scene, 64, rng, blur=blur))) for scene in scenes]
    assert np.mean([each.everything for each in verdicts]) >= 0.97


def test_places_and_radii_are_measured_to_a_fraction_of_a_pixel():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = sample_scene(rng, things=1)
        seen, thing = read(render(scene, 64)).things[0], scene.things[0]
        assert (seen.x, seen.y, seen.radius) == pytest.approx((thing.x, thing.y, thing.radius), abs=0.06 / 64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [0.10, 0.24])
def test_the_smallest_and_the_largest_of_each_shape_are_known(shape, radius):
    size = "small" if radius < 0.15 else "large"
    scene = Scene((Thing(shape, "black", size, 0.481, 0.517, radius),), Background())
    assert judged(scene, scene).everything


def test_close_neighbours_stay_apart_when_blurred():
    things = tuple(Thing("circle", "black", "small", x, 0.5, 0.12) for x in (0.36, 0.36 + 2 * 0.12 + GAP))
    picture = disturbed(Scene(things, Background()), 64, np.random.default_rng(0), blur=1.0)
    assert [seen.shape for seen in read(picture).things] == ["circle", "circle"]


def other_first(scene: Scene, **changes: object) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **changes), *scene.things[1:]))


CORRUPTIONS = {
    "colors": (TWO, other_first(TWO, color="purple")),
    "shapes": (TWO, other_first(TWO, shape="square")),
    "sizes": (TWO, other_first(TWO, radius=0.12)),
    "relation": (TWO, replace(TWO, things=tuple(replace(thing, y=1 - thing.y) for thing in TWO.things))),
    "background": (TWO, replace(TWO, background=Background("plain", "cyan"))),
    "positions": (ONE, other_first(ONE, x=0.5)),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_one_wrong_attribute_is_noticed_and_named(kind):
    claimed, drawn = CORRUPTIONS[kind]
    assert judged(claimed, claimed).everything
    found = judged(claimed, drawn)
    assert not found.everything
    wrong = {name for name, held in found.claims().items() if not all(held)}
    assert wrong == {kind}


def test_random_scenes_with_a_changed_color_or_shape_are_noticed():
    rng = np.random.default_rng(3)
    for _ in range(60):
        scene = sample_scene(rng)
        shape = SHAPES[(SHAPES.index(scene.things[0].shape) + int(rng.integers(1, 6))) % 6]
        assert not all(judged(scene, other_first(scene, shape=shape)).shapes)


def test_colors_bound_to_the_wrong_things_are_noticed():
    swapped = tuple(replace(thing, color=color) for thing, color in zip(TWO.things, ("blue", "red"), strict=True))
    found = judged(TWO, replace(TWO, things=swapped))
    assert not found.everything
    assert found.count


def test_a_missing_thing_is_noticed():
    found = judged(TWO, Scene(TWO.things[:1], TWO.background))
    assert not found.count
    assert found.shapes == (True, False)
    assert found.relation == (False,)


def test_an_additional_thing_is_noticed():
    found = judged(Scene(TWO.things[1:], TWO.background), TWO)  # the smaller of the two
    assert not found.count
    assert found.shapes == (True,)


def test_a_row_in_another_order_or_out_of_line_is_noticed():
    assert judged(ROW, ROW).everything
    swapped = tuple(replace(thing, x=x) for thing, x in zip(ROW.things, (0.5, 0.2, 0.8), strict=True))
    assert judged(ROW, replace(ROW, things=swapped)).relation == (False,)
    assert judged(ROW, other_first(ROW, y=0.15)).relation == (False,)


def test_a_gradient_is_no_plain_color_and_has_a_direction():
    first, last = ROW.background.color, ROW.background.second_color
    assert judged(ROW, replace(ROW, background=Background("plain", "gray"))).background == (False,)
    assert judged(ROW, replace(ROW, background=Background("gradient", last, first))).background == (False,)


def test_debris_counts_as_additional_things():
    rng = np.random.default_rng(0)
    for num_pixels in (12, 20, 40):
        for _ in range(10):
            picture = render(ONE, 64)
            spots = {(48, 40)}
            while len(spots) < num_pixels:
                y, x = sorted(spots)[rng.integers(len(spots))]
                spots.add(
                    (y + int(rng.integers(-1, 2)), x) if rng.random() < 0.5 else (y, x + int(rng.integers(-1, 2)))
                )
            picture[tuple(np.array(sorted(spots)).T)] = RGB["white"]
            found = verdict(facts(ONE), read(picture))
            assert not found.count
            assert found.shapes == (True,)


def test_specks_are_no_things():
    picture = render(ONE, 64)
    picture[40:42, 40:43] = 255
    assert judged(ONE, ONE).count
    assert len(read(picture).things) == 1


def diamond(side: int) -> np.ndarray:
    y, x = np.mgrid[0:side, 0:side] - side / 2 + 0.5
    return np.abs(x) + np.abs(y) < side * 0.25


def two_discs(side: int) -> np.ndarray:
    y, x = np.mgrid[0:side, 0:side] / side
    return np.minimum(np.hypot(x - 0.35, y - 0.5), np.hypot(x - 0.65, y - 0.5)) < 0.17


@pytest.mark.parametrize("mask", [diamond(64), two_discs(64)], ids=["a diamond", "two discs that touch"])
def test_what_is_none_of_the_shapes_is_unknown(mask):
    picture = np.full((64, 64, 3), 250, np.uint8)
    picture[mask] = RGB["red"]
    assert [(seen.shape, seen.color) for seen in read(picture).things] == [(UNKNOWN, "red")]


@pytest.mark.parametrize("second", ["blue", "orange"])
def test_a_thing_of_two_colors_is_unknown(second):
    picture = render(Scene((Thing("circle", "red", "large", 0.5, 0.5, 0.22),), Background()), 64)
    picture[:, 36:][(picture[:, 36:] == RGB["red"]).all(-1)] = RGB[second]
    assert [seen.shape for seen in read(picture).things] == [UNKNOWN]


def test_a_color_far_from_the_table_is_unknown():
    assert read(np.full((64, 64, 3), 200, np.uint8)).background == ("plain", UNKNOWN)


def test_an_empty_picture_and_pure_noise_show_no_thing_that_was_asked_for():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for picture in (np.full((64, 64, 3), 250, np.uint8), noise):
        found = verdict(facts(TWO), read(picture))
        assert not found.everything
        assert not any(found.shapes)


def test_claims_are_paired_with_the_things_that_suit_them():
    claims = Claims((ThingClaim("circle", "red"), ThingClaim("circle", "blue")))
    seen = [Seen("circle", color, "small", 0.5, 0.5, 0.1, 1.0) for color in ("blue", "red")]
    found = verdict(claims, Reading(tuple(seen), ("plain", "white")))
    assert found.everything
    assert found.sizes == found.background == ()


@pytest.mark.parametrize(
    "picture",
    [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32), np.zeros((64, 80, 3), np.uint8)],
    ids=["too small", "not uint8", "not square"],
)
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(ValueError, match="picture must be uint8 of H x H x 3 with H >= 48"):
        read(picture)
