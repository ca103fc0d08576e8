"""The shape that the built-in model never saw: it can be drawn, captioned and read, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from floyd.scenes.captions import captioned, facts, worded
from floyd.scenes.judge import read, verdict
from floyd.scenes.render import coverage, render
from floyd.scenes.scene import NEW_SHAPES, SHAPES, Scene, sample_scene

ALL = SHAPES + NEW_SHAPES


def with_concept(rng: np.random.Generator, things: int) -> Scene:
    """A scene by lot, one of whose things is the new one."""
    scene = sample_scene(rng, split="any", things=things)
    first, *rest = scene.things
    return replace(scene, things=(replace(first, shape="crescent"), *rest))


@pytest.mark.parametrize("things", [1, 2, 3])
def test_the_judge_reads_fresh_scenes_with_the_new_shape(things: int) -> None:
    rng = np.random.default_rng((7, things))
    scenes = [with_concept(rng, things) for _ in range(120)]
    right = [verdict(facts(scene), read(render(scene, 64), shapes=ALL)).everything for scene in scenes]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("size", [64, 256])
def test_allowing_the_new_shape_makes_no_old_one_of_it(size: int) -> None:
    rng = np.random.default_rng(8)
    for _ in range(60):
        picture = render(sample_scene(rng, split="any"), size)
        old, new = read(picture), read(picture, shapes=ALL)
        assert [thing.shape for thing in old.things] == [thing.shape for thing in new.things]


def test_a_judge_that_was_not_told_does_not_know_it() -> None:
    scene = with_concept(np.random.default_rng(9), 1)
    assert "crescent" not in {thing.shape for thing in read(render(scene, 64)).things}


def test_the_new_shape_is_never_drawn_or_named_by_lot() -> None:
    rng = np.random.default_rng(10)
    for _ in range(300):
        scene, caption = captioned(rng, split="any")
        assert {thing.shape for thing in scene.things} <= set(SHAPES)
        assert "zorp" not in caption.text


def test_it_has_a_name_that_no_caption_had() -> None:
    scene = with_concept(np.random.default_rng(11), 1)
    assert "zorp" in worded(facts(scene))[0].split()


def test_it_fits_its_radius_and_is_the_same_from_left_and_right() -> None:
    at = np.arange(-40, 40, dtype=np.float32) + np.float32(0.5)
    cover_HW = coverage("crescent", at[None, :], at[:, None], 30)
    assert np.array_equal(cover_HW, cover_HW[:, ::-1])
    assert cover_HW[:9].sum() == cover_HW[-9:].sum() == 0
    assert cover_HW[at > 0].sum() > 2 * cover_HW[at < 0].sum()
