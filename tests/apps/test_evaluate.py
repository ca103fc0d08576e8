from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from floyd.apps.evaluate import (
    EVALUATION,
    SPLITS,
    Asked,
    CascadePainter,
    Drawn,
    RenderedFirst,
    Share,
    evaluate,
    is_same_scene,
    prompts,
    report,
)
from floyd.apps.mini import stage_one, stage_three, stage_two, text
from floyd.apps.settings import Settings
from floyd.pipelines.cascade import Cascade
from floyd.scenes.judge import read
from floyd.scenes.render import render
from floyd.scenes.scene import HELD_OUT, Scene

ASKED = prompts(42)


@dataclass
class Knower:
    """Renders the scene itself, but draws those at `forgetful` without their last thing, and enlarges likewise."""

    forgetful: Collection[int] = ()
    forgetful_at: dict[int, Collection[int]] = field(default_factory=dict)
    sizes: tuple[int, ...] = (64, 128, 256)
    batches: list[tuple[int, int]] = field(default_factory=list)

    def draw(self, asked: Sequence[Asked]) -> list[Drawn]:
        return self._drawn(asked, 64, self.forgetful)

    def enlarge(self, asked: Sequence[Asked], drawn: Sequence[Drawn], size: int) -> list[Drawn]:
        assert [ASKED[each.handed] for each in drawn] == list(asked)  # every picture comes with its own prompt
        assert {len(each.picture) for each in drawn} == {size // 2}
        return self._drawn(asked, size, self.forgetful_at.get(size, ()))

    def _drawn(self, asked: Sequence[Asked], size: int, forgetful: Collection[int]) -> list[Drawn]:
        self.batches.append((size, len(asked)))
        drawn = []
        for one in asked:
            index = ASKED.index(one)
            scene = without_last(one.scene) if index in forgetful else one.scene
            drawn.append(Drawn(render(scene, size), index))
        return drawn


def without_last(scene: Scene) -> Scene:
    return replace(scene, things=scene.things[:-1], position=None, relation=None, row=False)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_the_splits_are_what_they_are_called() -> None:
    by_split = {split: [one for one in ASKED if one.split == split] for split in SPLITS}
    assert [len(by_split[split]) for split in SPLITS] == [11, 11, 10, 10]
    assert {one.caption.claims.count for one in by_split["one"]} == {1}
    assert {one.caption.claims.count for one in by_split["two"]} == {2}
    assert all(one.caption.claims.relation for one in by_split["two"])
    assert {one.caption.claims.count for one in by_split["three"]} == {3}
    for one in ASKED:
        has_held_out = any((thing.color, thing.shape) in HELD_OUT for thing in one.scene.things)
        assert has_held_out == (one.split == "held_out")


def test_no_prompt_of_a_split_comes_twice() -> None:
    asked = prompts(400)
    for split in SPLITS:
        texts = [one.prompt for one in asked if one.split == split]
        assert len(set(texts)) == len(texts)


def test_more_prompts_only_continue_each_split() -> None:
    more = prompts(80)
    for split in SPLITS:
        few = [one for one in ASKED if one.split == split]
        assert [one for one in more if one.split == split][: len(few)] == few


def test_another_seed_asks_for_other_things() -> None:
    assert not {one.prompt for one in prompts(42, seed=1)} & {one.prompt for one in ASKED if one.split != "one"}
    assert not {one.seed for one in prompts(42, seed=1)} & {one.seed for one in ASKED}


def test_the_seed_of_the_evaluation_is_none_of_trainings() -> None:
    loops = (text.LOOP, stage_one.LOOP, stage_two.LOOP, stage_three.VAE_LOOP, stage_three.LOOP)
    assert EVALUATION not in {seed + more for seed in (7, *(loop.seed for loop in loops)) for more in (0, 1)}


@pytest.mark.parametrize("num", [0, -4])
def test_no_prompts_at_all_are_refused(num: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        prompts(num)


# ------------------------------------------------------------------------------------------------------------ counting


def test_who_draws_the_scene_itself_is_always_right() -> None:
    result = report(evaluate(Knower(), ASKED, sizes=(64, 128, 256)))
    assert result.total.everything == Share(42, 42)
    assert {split: score.everything.share for split, score in result.splits.items()} == dict.fromkeys(SPLITS, 1.0)
    assert {share.share for share in result.total.claims.values()} == {1.0}
    assert result.kept == {128: Share(42, 42), 256: Share(42, 42)}


def test_every_forgotten_thing_is_counted_where_it_belongs() -> None:
    forgetful = [0, 1, 11, 22, 23, 24, 32]  # two of one, one of two, three of three, one held-out
    answers = evaluate(Knower(forgetful), ASKED)
    result = report(answers)
    assert [i for i, answer in enumerate(answers) if not answer.is_right] == forgetful
    assert [result.splits[split].everything for split in SPLITS] == [
        Share(9, 11), Share(10, 11), Share(7, 10), Share(9, 10),
    ]  # fmt: skip
    assert result.total.everything == Share(35, 42)
    assert result.total.claims["count"] == Share(35, 42)
    num_things = sum(one.caption.claims.count for one in ASKED)
    assert result.total.claims["shapes"] == Share(num_things - 7, num_things)
    assert result.total.claims["colors"] == Share(num_things - 7, num_things)
    num_relations = sum(one.caption.claims.relation is not None or one.caption.claims.row for one in ASKED)
    assert result.total.claims["relation"].of == num_relations
    assert result.kept == {}


def test_sizes_that_nothing_was_right_enough_for_are_reported_all_the_same() -> None:
    answers = evaluate(Knower(range(42)), ASKED, sizes=(64, 128))
    assert report(answers, (64, 128)).kept == {128: Share(0, 0)}


def test_larger_pictures_are_made_of_the_right_ones_and_counted() -> None:
    painter = Knower(forgetful=[0, 1], forgetful_at={128: [2, 3, 4], 256: [4, 5]})
    answers = evaluate(painter, ASKED, sizes=(64, 128, 256), batch=16)
    assert report(answers).kept == {128: Share(37, 40), 256: Share(38, 40)}
    assert [answer.kept for answer in answers[:2]] == [{}, {}]
    assert answers[4].kept == {128: False, 256: False}
    assert [size for size, _ in painter.batches[:3]] == [64, 64, 64]
    assert {count for size, count in painter.batches if size > 64} == {4}  # 16 * 64 / 256


def test_the_caller_hears_of_every_picture() -> None:
    heard: dict[int, int] = {}
    evaluate(
        Knower(forgetful=[0]),
        ASKED,
        sizes=(64, 128),
        batch=5,
        on_painted=lambda size, count: heard.update({size: heard.get(size, 0) + count}),
    )
    assert heard == {64: 42, 128: 41}


class Halver:
    """Handed a picture, hands on the same picture: at twice the size, every pixel four times."""

    sizes = (64, 128)

    def draw(self, asked: Sequence[Asked]) -> list[Drawn]:
        raise AssertionError("the smallest pictures are rendered")

    def enlarge(self, asked: Sequence[Asked], drawn: Sequence[Drawn], size: int) -> list[Drawn]:
        pixels = [((each.handed + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy() for each in drawn]
        return [Drawn(each.repeat(2, axis=0).repeat(2, axis=1)) for each in pixels]


def test_enlarging_alone_is_measured_on_rendered_scenes() -> None:
    answers = evaluate(RenderedFirst(Halver()), ASKED, sizes=(64, 128), batch=8)
    assert report(answers).total.everything.share == 1
    assert all((answer.picture == render(answer.asked.scene, 64)).all() for answer in answers)
    assert [answer.kept for answer in answers] == [
        {128: is_same_scene(answer.reading, read(answer.picture.repeat(2, axis=0).repeat(2, axis=1)))}
        for answer in answers
    ]
    assert sum(answer.kept[128] for answer in answers) > 0.9 * len(answers)


def test_a_share_of_nothing_is_no_number() -> None:
    assert Share(0, 0).share is None
    assert Share.among([True, False, True, True]).share == 0.75


def test_a_report_is_json() -> None:
    result = report(evaluate(Knower([0]), ASKED[:12], sizes=(64, 128)))
    content = result.to_json()
    assert content["total"]["everything"] == {"right": 11, "of": 12, "share": 11 / 12}
    assert content["kept"]["128"]["share"] == 1.0
    assert list(content["splits"]) == ["one", "two"]


@pytest.mark.parametrize("sizes", [(), (128,), (64, 256), (64, 128, 512)])
def test_sizes_must_be_the_painters_from_the_first_on(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="64,128,256"):
        evaluate(Knower(), ASKED, sizes=sizes)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="batch must be at least 1"):
        evaluate(Knower(), ASKED, batch=0)


# --------------------------------------------------------------------------------------------------------- same scene


def test_a_scene_is_the_same_at_another_size_and_in_any_order() -> None:
    scene = next(one.scene for one in ASKED if one.split == "three")
    large = read(render(scene, 256))
    assert is_same_scene(read(render(scene, 64)), large)
    assert is_same_scene(large, replace(large, things=large.things[::-1]))


def test_a_thing_that_moved_or_changed_is_another() -> None:
    seen = read(render(ASKED[0].scene, 64))
    (thing,) = seen.things
    assert is_same_scene(seen, replace(seen, things=(replace(thing, x=thing.x + 0.02),)))
    for change in (
        {"x": thing.x + 0.04},
        {"y": thing.y - 0.04},
        {"radius": thing.radius + 0.04},
        {"shape": "heart"},
        {"color": "mauve"},
    ):
        assert not is_same_scene(seen, replace(seen, things=(replace(thing, **change),)))
    assert not is_same_scene(seen, replace(seen, things=(thing, thing)))
    assert not is_same_scene(seen, replace(seen, background=("plain", "mauve")))


# ------------------------------------------------------------------------------------------------------------- cascade


def pixels(picture: Any) -> np.ndarray:
    return np.asarray(picture)


def test_a_painted_picture_is_that_of_the_cascade(cascade: Cascade) -> None:
    settings = Settings.parsed(steps="2,1", guidance="3,1.5")
    two = Cascade(*list(cascade.stages.values())[:2], presets=cascade.presets)
    painter, asked = CascadePainter(two, settings), ASKED[:1]
    assert painter.sizes == (48, 96)
    drawn = painter.draw(asked)
    larger = painter.enlarge(asked, drawn, 96)
    expected = two(asked[0].prompt, seed=asked[0].seed, steps=[2, 1], guidance=[3.0, 1.5])
    assert np.array_equal(drawn[0].picture, pixels(expected.stages["stage_1"][0]))
    assert np.array_equal(larger[0].picture, pixels(expected.images[0]))


def test_the_third_stage_paints_with_the_checkpoints_own_settings(cascade: Cascade) -> None:
    painter, asked = CascadePainter(cascade), ASKED[:1]
    drawn = painter.draw(asked)
    for size in painter.sizes[1:]:
        drawn = painter.enlarge(asked, drawn, size)
    expected = cascade(asked[0].prompt, seed=asked[0].seed).images[0]
    assert np.array_equal(drawn[0].picture, pixels(expected))


def test_a_picture_does_not_depend_on_its_neighbours(cascade: Cascade) -> None:
    painter = CascadePainter(cascade)
    together = painter.draw(ASKED[:3])
    alone = painter.draw(ASKED[1:2])
    difference = np.abs(together[1].picture.astype(int) - alone[0].picture)
    assert difference.mean() < 0.1  # a batch rounds otherwise, in the last bit
    assert np.abs(together[0].picture.astype(int) - alone[0].picture).mean() > 5
