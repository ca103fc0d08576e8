"""B images  C channels  H height  W width"""

import math
from itertools import pairwise

import pytest
import torch

from floyd.diffusion.canvas import Canvas
from floyd.diffusion.engine import denoise, moves
from floyd.diffusion.limits import Clip, DynamicThreshold
from floyd.diffusion.multistep import DPMSolver, UniPC
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Prediction
from floyd.diffusion.schedule import NoiseSchedule
from floyd.diffusion.solvers import Euler, EulerAncestral, Heun, with_corrections
from floyd.diffusion.timesteps import Step, steps_of, trailing

MEAN, STD = 0.4, 0.5
SOLVERS = {
    "euler": Euler,
    "euler ancestral": EulerAncestral,
    "heun": Heun,
    "dpm": DPMSolver,
    "dpm heun": lambda schedule, **more: DPMSolver(schedule, rule="heun", **more),
    "dpm sde": lambda schedule, **more: DPMSolver(schedule, is_stochastic=True, **more),
    "unipc": UniPC,
    "unipc bh1": lambda schedule, **more: UniPC(schedule, scale="bh1", **more),
}
ALL = pytest.mark.parametrize("name", SOLVERS)


def moves_of(name, table):
    steps = steps_of(table)
    return with_corrections(steps) if name == "heun" else steps


def perfect(schedule):
    """The best possible noise prediction where pictures are draws of N(MEAN, STD^2), by conjugacy."""

    def predict(x, t):
        abar = schedule.alpha_bar(t)
        noise = (1 - abar) ** 0.5 * (x - abar**0.5 * MEAN) / (abar * STD**2 + 1 - abar)
        return Prediction(noise, torch.zeros_like(noise))

    return predict


def chain(name, table, *, schedule=None, canvas=None, size=8, seed=0, x=None, **more):
    schedule = schedule or NoiseSchedule.cosine()
    canvas = canvas or Canvas.blank(1, size, size)
    noise = Noise.seeded(seed)
    x = canvas.first(schedule, table[0], noise) if x is None else x
    return denoise(x, perfect(schedule), SOLVERS[name](schedule, **more), moves_of(name, table), canvas, noise)


@ALL
def test_a_perfect_prediction_recovers_the_distribution_of_the_pictures(name):
    count = 500 if "euler" in name else 60  # the error of first order falls slowly
    x = chain(name, trailing(count), schedule=NoiseSchedule.linear(), size=64)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.025)
    assert x.std().item() == pytest.approx(STD, abs=0.025)


@pytest.mark.parametrize(
    ("name", "order"),
    [("euler", 1), ("heun", 2), ("dpm", 2), ("dpm heun", 2), ("unipc", 3), ("unipc bh1", 3)],
)
def test_the_error_falls_at_the_order_of_the_solver(name, order):
    """Between two noise levels a Gaussian's flow is known: the deviation from the mean scales with its deviation."""
    num_train = 20000
    schedule = NoiseSchedule(torch.linspace(0.9999, 0.01, num_train, dtype=torch.float64))
    log_snr_T = (schedule.alpha_bar_T / (1 - schedule.alpha_bar_T)).log()
    first, last = num_train - 1, 2000

    def spread(t):
        abar = schedule.alpha_bar(t)
        return (abar * STD**2 + 1 - abar) ** 0.5

    def error(count):
        ramp = torch.linspace(log_snr_T[first].item(), log_snr_T[last].item(), count + 1, dtype=torch.float64)
        table = [int((log_snr_T - value).abs().argmin()) for value in ramp]
        steps = [Step(i, t, t_next) for i, (t, t_next) in enumerate(pairwise(table))]
        if name == "heun":
            steps = [move for step in steps for move in (step, Step(step.index, step.t_prev, step.t_prev))]
        deviation = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)
        x = schedule.alpha_bar(first) ** 0.5 * MEAN + deviation * spread(first)
        arrived = denoise(x, perfect(schedule), SOLVERS[name](schedule), steps, Canvas(x), Noise())
        return (arrived - schedule.alpha_bar(last) ** 0.5 * MEAN - deviation * spread(last)).abs().max().item()

    coarse, fine = error(32), error(64)
    assert 0 < fine < coarse
    assert math.log2(coarse / fine) > order - 0.4


@ALL
def test_kept_pixels_never_change(name):
    picture, mask = torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    x = chain(name, (900, 500, 100), canvas=Canvas(picture, mask_B1HW=mask))
    assert torch.equal(x[..., 4:], picture[..., 4:])
    assert not torch.equal(x[..., :4], picture[..., :4])


@ALL
def test_chains_in_turns_do_not_disturb_each_other(name):
    schedule, canvas, table = NoiseSchedule.cosine(), Canvas.blank(1, 8, 8), (900, 700, 400, 100)
    sampler = SOLVERS[name](schedule)

    def begun(seed):
        noise = Noise.seeded(seed)
        x = canvas.first(schedule, table[0], noise)
        return moves(x, perfect(schedule), sampler, moves_of(name, table), canvas, noise)

    for one, other in zip(begun(1), begun(2), strict=True):
        last = one.x_BCHW, other.x_BCHW
    assert torch.equal(last[0], chain(name, table, seed=1))
    assert torch.equal(last[1], chain(name, table, seed=2))


@ALL
@pytest.mark.parametrize("table", [(800,), (800, 300), (999, 0)])
def test_the_shortest_chains_end_at_the_clean_picture(name, table):
    x = chain(name, table)
    steps = list(
        moves(
            torch.ones(1, 3, 8, 8),
            perfect(NoiseSchedule.cosine()),
            SOLVERS[name](NoiseSchedule.cosine()),
            moves_of(name, table),
            Canvas.blank(1, 8, 8),
            Noise.seeded(0),
        )
    )
    assert x.isfinite().all()
    torch.testing.assert_close(steps[-1].x_BCHW, steps[-1].clean_BCHW, rtol=0, atol=1e-6)


@ALL
@pytest.mark.parametrize("limit", [Clip(0.3), DynamicThreshold(0.9, 1.5)])
def test_every_clean_picture_is_kept_in_range(name, limit):
    schedule = NoiseSchedule.cosine()
    for moved in moves(
        torch.randn(1, 3, 8, 8),
        lambda x, t: Prediction(-3 * x),
        SOLVERS[name](schedule, limit=limit),
        moves_of(name, (900, 500, 100)),
        Canvas.blank(1, 8, 8),
        Noise.seeded(0),
    ):
        assert moved.clean_BCHW.abs().max() <= (0.3 if limit == Clip(0.3) else 1)


@ALL
def test_half_precision_is_computed_in_single(name):
    x = chain(name, (900, 500), x=torch.ones(1, 3, 8, 8, dtype=torch.float16))
    assert x.dtype == torch.float32


@pytest.mark.parametrize("name", ["euler", "heun", "dpm", "unipc"])
def test_the_deterministic_solvers_draw_no_noise(name):
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    schedule = NoiseSchedule.cosine()
    x = torch.ones(1, 3, 8, 8)
    denoise(x, perfect(schedule), SOLVERS[name](schedule), moves_of(name, (900, 500)), Canvas(x), Noise(generator))
    assert torch.equal(generator.get_state(), state)


def test_every_step_but_the_last_is_corrected_where_it_arrives():
    assert with_corrections(steps_of((9, 5, 2))) == (
        Step(0, 9, 5), Step(1, 5, 5), Step(2, 5, 2), Step(3, 2, 2), Step(4, 2, -1),
    )  # fmt: skip


def test_a_correction_of_nothing_is_refused():
    x = torch.ones(1, 3, 8, 8)
    with pytest.raises(ValueError, match="t=5 corrects the step before it, but it is the first"):
        Heun(NoiseSchedule.cosine()).step(x, Prediction(x), Step(0, 5, 5), Noise())


def test_a_chain_that_rests_at_the_smallest_noise_level_does_not_move():
    x = torch.ones(1, 3, 8, 8)
    for name in ("euler", "dpm", "dpm heun", "unipc"):
        sampler = SOLVERS[name](NoiseSchedule.linear(), ends_clean=False)
        moved = sampler.step(x, Prediction(x), Step(0, 0, -1), Noise())
        torch.testing.assert_close(moved.x_BCHW, x)


@pytest.mark.parametrize(
    ("solver", "option"),
    [(DPMSolver, {"rule": "rk4"}), (DPMSolver, {"order": 3}), (UniPC, {"scale": "bh3"}), (UniPC, {"order": 0}),
     (Euler, {"prediction": "score"})],
)  # fmt: skip
def test_an_unknown_option_is_refused(solver, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        solver(NoiseSchedule.cosine(), **option)
