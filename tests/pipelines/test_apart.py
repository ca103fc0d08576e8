"""One image, one branch, one thread at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Ancestral, Move, Prediction, Remembering
from floyd.diffusion.schedule import NoiseSchedule
from floyd.diffusion.timesteps import Step
from floyd.pipelines.apart import Apart, each, steady

SCHEDULE = NoiseSchedule.cosine()
STEP = Step(0, 500, 400)


@dataclass(frozen=True, eq=False)
class Counting(Remembering):
    """Moves by how often it has moved, and tells what it was given."""

    schedule: NoiseSchedule = SCHEDULE
    moves: int = 0
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def advance(self, x_BCHW: Tensor, pred: Prediction, step: Step, noise: Noise) -> tuple[Move, Counting]:
        self.seen.append((len(x_BCHW), len(pred.target_BCHW), self.moves, torch.get_num_threads()))
        moved = Move(x_BCHW + self.moves + noise(x_BCHW), x_BCHW)
        return moved, Counting(moves=self.moves + 1, seen=self.seen)


def test_a_sampler_moves_one_image_at_a_time_and_each_remembers_its_own_past() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        counting = Counting()
        sampler, x_BCHW = Apart.of(counting, 2), torch.zeros(2, 1, 4, 4)
        for _ in range(2):
            (x_BCHW, _), sampler = sampler.advance(x_BCHW, Prediction(x_BCHW, x_BCHW), STEP, Noise.seeded([0, 1]))
    finally:
        torch.set_num_threads(before)
    assert counting.seen == [(1, 1, 0, 1), (1, 1, 0, 1), (1, 1, 1, 1), (1, 1, 1, 1)]
    assert sampler.schedule is SCHEDULE
    own = [Noise.seeded(seed)(torch.zeros(1, 1, 4, 4)) for seed in (0, 1)]
    assert torch.equal(x_BCHW, torch.cat([noise + 1 + noise for noise in own]))


@pytest.mark.parametrize("seed", [3, [3, 4]], ids=["one generator", "a generator for each"])
def test_the_moves_are_those_of_the_sampler_itself(seed: int | list[int]) -> None:
    x_BCHW, target_BCHW, variance_BCHW = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pred = Prediction(target_BCHW, variance_BCHW)
    sampler = Ancestral(SCHEDULE)
    moved, _ = Apart.of(sampler, 2).advance(x_BCHW, pred, STEP, Noise.seeded(seed))
    expected = sampler.step(x_BCHW, pred, STEP, Noise.seeded(seed))
    for part, wanted in zip(moved, expected, strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-6, rtol=0)


def test_a_prediction_without_variance_has_none_for_each_image() -> None:
    x_BCHW = torch.ones(2, 3, 8, 8)
    moved, _ = Apart.of(Ancestral(SCHEDULE, variance="fixed_small"), 2).advance(
        x_BCHW, Prediction(x_BCHW), STEP, Noise.seeded(0)
    )
    assert moved.x_BCHW.shape == x_BCHW.shape


def test_work_is_done_image_by_image_in_memory_that_begins_where_memory_begins() -> None:
    seen: list[Tensor] = []
    x_BCHW = torch.arange(6.0).view(3, 2, 1, 1)
    doubled = each(lambda x: seen.append(x) or 2 * x, x_BCHW)  # type: ignore[func-returns-value]
    assert torch.equal(doubled, 2 * x_BCHW)
    assert [len(x) for x in seen] == [1, 1, 1]
    assert all(x.data_ptr() % 64 == 0 for x in seen)


def test_threads_are_left_alone_unless_steadiness_is_wanted() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with steady(False):
            assert torch.get_num_threads() == 2
        with steady(True):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
