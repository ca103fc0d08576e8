"""Backgrounds are found behind things; pieces are counted as the eye counts them."""

from __future__ import annotations

import numpy as np
import pytest

from floyd.scenes.regions import fitted_background, labelled, reduced, widened
from floyd.scenes.render import render
from floyd.scenes.scene import Background, Scene, color_255, sample_scene

PICTURES = {
    "nothing": ([".....", "....."], 0),
    "two apart": (["##.##", "##.##"], 2),
    "joined by a corner": (["##...", "..###"], 1),
    "a ring": (["#####", "#...#", "#####"], 1),
    "joined at the bottom": (["#.#.#", "#.#.#", "#####"], 1),
    "a spiral beside a dot": (["####.#", "#.....", "#.####", "#....#", "######"], 2),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pieces_are_counted_with_corners_connecting(name):
    rows, count = PICTURES[name]
    mask = np.array([[char == "#" for char in row] for row in rows])
    labels, found = labelled(mask)
    assert found == count
    assert np.array_equal(labels > 0, mask)
    assert set(np.unique(labels[mask])) == set(range(1, count + 1))


def test_labels_agree_with_flooding():
    mask = np.random.default_rng(0).random((40, 30)) < 0.4
    labels, found = labelled(mask)
    flooded = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0).astype(np.float32)
    while True:
        spread = np.where(mask, widened(flooded), 0)
        if np.array_equal(spread, flooded):
            break
        flooded = spread
    assert found == len(np.unique(flooded[mask]))
    for value in np.unique(flooded[mask]):
        assert len(np.unique(labels[flooded == value])) == 1


def test_the_background_is_found_behind_the_things():
    rng = np.random.default_rng(0)
    for _ in range(60):
        scene = sample_scene(rng)
        found, _ = fitted_background(render(scene, 64).astype(np.float32))
        behind = render(Scene((), scene.background), 64)
        assert np.abs(found - behind).max() < 3


def test_a_frame_that_things_touch_does_not_mislead():
    picture = render(Scene((), Background("plain", "cyan")), 64).astype(np.float32)
    picture[:40, :40] = color_255("red")
    found, _ = fitted_background(picture)
    assert np.abs(found - color_255("cyan")).max() < 3


@pytest.mark.parametrize(("side", "expected"), [(64, 64), (150, 150), (256, 128), (300, 128), (1024, 128)])
def test_large_pictures_are_averaged_down(side, expected):
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    small = reduced(picture)
    assert small.shape == (expected, expected, 3)
    assert small.mean() == pytest.approx(picture.mean(), abs=0.5)
