"""The laws of drawing scenes by lot."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from floyd.scenes.scene import (
    CONTRAST,
    GAP,
    HELD_OUT,
    MARGIN,
    RADII,
    RGB,
    SHAPES,
    THING_COLORS,
    Background,
    Scene,
    Thing,
    color_255,
    position_of,
    relation_between,
    sample_scene,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(2000)]


def looks(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.color, thing.shape) for thing in scene.things}


def test_training_never_shows_a_held_out_pair_and_shows_all_others(scenes):
    seen = set().union(*map(looks, scenes))
    assert seen == {(color, shape) for color in THING_COLORS for shape in SHAPES} - HELD_OUT


def test_every_held_out_color_and_shape_is_trained_in_other_pairs():
    for color, shape in HELD_OUT:
        assert sum(color == other for other, _ in HELD_OUT) < len(SHAPES)
        assert sum(shape == other for _, other in HELD_OUT) < len(THING_COLORS)


@pytest.mark.parametrize("things", [1, 2, 3])
def test_the_held_out_split_always_shows_a_held_out_pair(things):
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = sample_scene(rng, split="held_out", things=things)
        assert len(scene.things) == things
        assert looks(scene) & HELD_OUT


def test_any_draws_both_kinds_of_pairs():
    rng = np.random.default_rng(2)
    drawn = [bool(looks(sample_scene(rng, split="any", things=1)) & HELD_OUT) for _ in range(300)]
    assert 0 < sum(drawn) < 100


def test_the_counts_have_their_shares(scenes):
    shares = Counter(len(scene.things) for scene in scenes)
    assert [shares[count] / len(scenes) for count in (1, 2, 3)] == pytest.approx([0.35, 0.45, 0.20], abs=0.03)


def test_things_lie_inside_apart_and_differ(scenes):
    for scene in scenes:
        assert len(looks(scene)) == len(scene.things)
        for index, thing in enumerate(scene.things):
            low, high = RADII[thing.size]
            assert low <= thing.radius <= high
            for place in (thing.x, thing.y):
                assert thing.radius + MARGIN <= place + 1e-9
                assert place - 1e-9 <= 1 - thing.radius - MARGIN
            for other in scene.things[:index]:
                apart = max(abs(thing.x - other.x), abs(thing.y - other.y))
                assert apart >= thing.radius + other.radius + GAP - 1e-9


def test_what_a_scene_states_is_so(scenes):
    for scene in scenes:
        if scene.position:
            assert position_of(scene.things[0].x, scene.things[0].y) == scene.position
        if scene.relation:
            one, other = scene.things
            assert relation_between(one.x, one.y, other.x, other.y) == scene.relation
        if scene.row:
            assert [thing.x for thing in scene.things] == sorted(thing.x for thing in scene.things)
            assert np.ptp([thing.y for thing in scene.things]) < 0.12
    stated = Counter((scene.position, scene.relation, scene.row) for scene in scenes)
    assert len(stated) == 9 + 4 + 1 + 1


def test_things_contrast_with_their_whole_background(scenes):
    for scene in scenes:
        start = color_255(scene.background.color)
        end = color_255(scene.background.second_color or scene.background.color)
        for share in np.linspace(0, 1, 11, dtype=np.float32):
            behind = start + share * (end - start)
            for thing in scene.things:
                assert np.linalg.norm(color_255(thing.color) - behind) >= CONTRAST - 0.01


def test_all_colors_are_well_separated():
    names = list(RGB)
    distances = [np.linalg.norm(color_255(one) - color_255(other)) for one in names for other in names if one < other]
    assert min(distances) > 90


def test_one_seed_gives_one_scene():
    one, same, other = (sample_scene(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert one == same != other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sample_scene(np.random.default_rng(0), split="test"), "split must be one of train, held_out, any"),
        (lambda: sample_scene(np.random.default_rng(0), things=4), "things must be 1, 2, 3 or None"),
        (lambda: Thing("blob", "red", "small", 0.5, 0.5, 0.1), "shape must be one of circle"),
        (lambda: Thing("circle", "mauve", "small", 0.5, 0.5, 0.1), "color must be one of red"),
        (lambda: Thing("circle", "red", "small", 0.5, 0.5, 0.0), "radius above 0"),
        (lambda: Background("gradient", "white"), "second_color must be one of"),
        (lambda: Background("plain", "white", "black"), "use kind='gradient'"),
        (lambda: Scene((), Background(), relation="above"), "a relation 2"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
