"""A scene looks the same at every size, and a window is the whole's slice."""

from __future__ import annotations

import math

import numpy as np
import pytest

from floyd.scenes.render import render, render_crop
from floyd.scenes.scene import RGB, SHAPES, Background, Scene, Thing, sample_scene

WINDOWS = [(64, 0, 0, 64, 64), (64, 5, 30, 17, 9), (256, 100, 3, 64, 64), (256, 255, 255, 1, 1), (100, 0, 37, 33, 63)]


def one(shape: str, *, x: float = 0.5, y: float = 0.5, radius: float = 0.2) -> Scene:
    return Scene((Thing(shape, "black", "large", x, y, radius),), Background())


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_bit_for_bit_the_slice_of_the_whole(window):
    size, top, left, height, width = window
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = sample_scene(rng)
        whole = render(scene, size)[top : top + height, left : left + width]
        assert np.array_equal(render_crop(scene, size, top, left, height, width), whole)


def test_a_small_picture_is_the_average_of_a_large_one():
    rng = np.random.default_rng(1)
    for _ in range(40):
        scene = sample_scene(rng)
        averaged = render(scene, 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
        difference = np.abs(averaged - render(scene, 64))
        assert difference.max() < 45
        assert difference.mean() < 0.6


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi),
        ("ring", math.pi * (1 - 0.55**2)),
        ("square", 1.76**2),
        ("triangle", math.sqrt(3)),
        ("star", 5 * 0.48 * math.sin(math.radians(36))),
        ("cross", 8 * 0.96 * 0.32 - 4 * 0.32**2),
    ],
)
def test_the_drawn_area_is_the_shapes(shape, area):
    picture = render(one(shape, x=0.47, y=0.52), 256).astype(float)
    covered = ((250 - picture[..., 0]) / (250 - 15)).sum()
    assert covered == pytest.approx(area * (0.2 * 256) ** 2, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_in_their_box_and_face_up(shape):
    picture = render(one(shape), 200)[..., 0] < 200
    rows, columns = np.nonzero(picture)
    assert rows.min() >= 60
    assert rows.max() < 140
    assert columns.min() >= 60
    assert columns.max() < 140
    assert np.array_equal(picture, picture[:, ::-1])
    if shape == "triangle":
        assert picture[70].sum() < picture[130].sum()
    if shape == "star":
        assert picture[62].any()
        assert not picture[139].any()


def test_colors_are_exact_inside_and_behind():
    picture = render(one("circle"), 64)
    assert tuple(picture[32, 32]) == RGB["black"]
    assert tuple(picture[0, 0]) == RGB["white"]


@pytest.mark.parametrize("direction", ["vertical", "horizontal"])
def test_gradients_run_from_the_first_color_to_the_second(direction):
    scene = Scene(one("circle").things, Background("gradient", "cyan", "pink", direction))
    picture = render(scene, 256)
    picture = picture if direction == "vertical" else picture.transpose(1, 0, 2)
    assert np.abs(picture[0, 0] - np.array(RGB["cyan"])).max() <= 1
    assert np.abs(picture[-1, -1] - np.array(RGB["pink"])).max() <= 1
    assert np.array_equal(picture[0, 0], picture[0, -1])
    assert (np.diff(picture[:, 0, 0].astype(int)) >= 0).all()


def test_a_window_beyond_the_picture_is_refused():
    with pytest.raises(ValueError, match="the window must lie in the picture of 64 x 64"):
        render_crop(one("circle"), 64, 60, 0, 8, 8)
