"""B images  C channels  H height  W width"""

import pytest
import torch

from floyd.diffusion.canvas import Canvas
from floyd.diffusion.engine import denoise
from floyd.diffusion.multistep import DPMSolver, UniPC
from floyd.diffusion.noise import Noise
from floyd.diffusion.repaint import NoisedCanvas, Repaint, Return, by_the_table, repainting, resampled
from floyd.diffusion.samplers import Ancestral, Implicit, Prediction
from floyd.diffusion.schedule import NoiseSchedule
from floyd.diffusion.solvers import Euler, EulerAncestral, Heun, with_corrections
from floyd.diffusion.timesteps import steps_of

SCHEDULE = NoiseSchedule.cosine()
SAMPLERS = {
    "ddpm": Ancestral(SCHEDULE, variance="fixed_small", limit=None),
    "ddim": Implicit(SCHEDULE, limit=None, stride=25),
    "dpm": DPMSolver(SCHEDULE),
    "sde-dpm": DPMSolver(SCHEDULE, is_stochastic=True),
    "unipc": UniPC(SCHEDULE),
    "euler": Euler(SCHEDULE),
    "euler ancestral": EulerAncestral(SCHEDULE),
    "heun": Heun(SCHEDULE),
}
TABLE = tuple(range(975, -1, -25))

# Two pixels that know each other: a Gaussian, of which the left one is kept.
SPREAD, LIKENESS, KEPT = 0.5, 0.9, 0.6
COVARIANCE = SPREAD**2 * torch.tensor([[1.0, LIKENESS], [LIKENESS, 1.0]])
RIGHT = torch.tensor([[[[0.0, 1.0]]]])
EXACT_MEAN, EXACT_STD = LIKENESS * KEPT, SPREAD * (1 - LIKENESS**2) ** 0.5  # of the right one, given the left one


def exact(x_BCHW, t):
    """What a perfect network says of the Gaussian: minus the score of its noised density, times the noise's spread."""
    alpha_bar = SCHEDULE.alpha_bar(t)
    noised = alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2)
    noise_B2 = (1 - alpha_bar) ** 0.5 * torch.linalg.solve(noised, x_BCHW.flatten(1).T).T
    return Prediction(noise_B2.view_as(x_BCHW))


def steps_for(sampler, table=TABLE):
    return with_corrections(steps_of(table)) if isinstance(sampler, Heun) else steps_of(table)


def painted(sampler, resamples, canvas, predict=exact, noise=None, table=TABLE):
    """As the painter puts it together; 0: without RePaint."""
    noise, steps = noise or Noise.seeded(7), steps_for(sampler, table)
    if resamples:
        sampler, steps, canvas = by_the_table(sampler), resampled(steps, resamples), NoisedCanvas.of(canvas)
    x_BCHW = canvas.first(SCHEDULE, steps[0].t, noise)
    return denoise(x_BCHW, predict, repainting(sampler, canvas), steps, canvas, noise)


@pytest.mark.parametrize("name", SAMPLERS)
def test_resampling_approaches_the_exact_conditional_of_a_gaussian(name):
    """Keeping the clean picture does not: the network takes it for noise."""
    canvas = Canvas(torch.full((3000, 1, 1, 2), KEPT), mask_B1HW=RIGHT)
    results = {resamples: painted(SAMPLERS[name], resamples, canvas) for resamples in (0, 2, 5, 10)}
    means = {resamples: float(x[..., 1].mean()) for resamples, x in results.items()}
    assert means[0] < EXACT_MEAN - 0.11
    assert means[0] < means[2] < means[5] < means[10] < EXACT_MEAN + 0.01
    assert means[10] == pytest.approx(EXACT_MEAN, abs=0.05)
    assert float(results[10][..., 1].std()) == pytest.approx(EXACT_STD, abs=0.06)
    for x in results.values():
        assert torch.equal(x[..., 0], canvas.picture_BCHW[..., 0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_sees_the_kept_region_as_noisy_as_the_noise_level_says(name):
    """Without RePaint it is clean at every one."""
    canvas = Canvas(torch.randn(2000, 1, 1, 2) * SPREAD, mask_B1HW=RIGHT)
    seen = []

    def watching(x_BCHW, t):
        seen.append((t, x_BCHW[..., 0]))
        return exact(x_BCHW, t)

    painted(SAMPLERS[name], 3, canvas, watching)
    assert {t for t, _ in seen} == set(TABLE)
    clean = canvas.picture_BCHW[..., 0]
    for t, kept in seen:
        alpha_bar = SCHEDULE.alpha_bar(t)
        noise = (kept - alpha_bar**0.5 * clean) / (1 - alpha_bar) ** 0.5
        assert float(noise.std()) == pytest.approx(1, abs=0.1)
        assert float((noise * clean).mean()) == pytest.approx(0, abs=0.1)


def test_every_move_but_the_last_is_made_so_many_times():
    once = steps_of((900, 500, 0))
    assert resampled(once, 1) == once
    table = resampled(once, 3)
    assert [(step.t, step.t_prev, getattr(step, "back_to", None)) for step in table] == [
        (900, 500, 900), (900, 500, 900), (900, 500, None), (500, 0, 500), (500, 0, 500), (500, 0, None), (0, -1, None),
    ]  # fmt: skip
    assert [step.index for step in table] == [0, 0, 0, 1, 1, 1, 2]


def test_a_correction_belongs_to_its_move():
    table = resampled(with_corrections(steps_of((900, 500))), 2)
    assert [(step.t, step.t_prev, getattr(step, "back_to", None)) for step in table] == [
        (900, 500, None), (500, 500, 900), (900, 500, None), (500, 500, None), (500, -1, None),
    ]  # fmt: skip


@pytest.mark.parametrize("times", [0, -1, 101, 2.0, True, None])
def test_a_number_that_is_none_is_refused(times):
    with pytest.raises(ValueError, match=r"resamples must be an int in \[1, 100\]"):
        resampled(steps_of((900, 500)), times)


def test_one_seed_draws_in_the_order_that_is_documented():
    """The start; then for each move the sampler's noise, the kept region's and that of going back up."""
    shapes = []

    class Counting(Noise):
        def normal(self, shape, *, dtype=torch.float32, device="cpu"):
            shapes.append(tuple(shape))
            return super().normal(shape, dtype=dtype, device=device)

    canvas, noise = Canvas(torch.zeros(1, 1, 1, 2), mask_B1HW=RIGHT), Counting(torch.Generator().manual_seed(0))
    painted(SAMPLERS["ddpm"], 2, canvas, noise=noise, table=(900, 500, 0))
    assert len(shapes) == 1 + 2 * (3 + 2)  # the last move of the table ends clean and draws nothing
    shapes.clear()
    painted(SAMPLERS["euler"], 1, canvas, noise=noise, table=(900, 500, 0))
    assert len(shapes) == 1 + 2


def test_an_image_of_its_own_generator_does_not_depend_on_its_neighbours():
    canvas = Canvas(torch.tensor([[[[0.6, 0.0]]], [[[-0.4, 0.0]]]]), mask_B1HW=RIGHT)
    alone = Canvas(canvas.picture_BCHW[1:], mask_B1HW=RIGHT)
    for name in ("ddpm", "unipc"):
        together = painted(SAMPLERS[name], 3, canvas, noise=Noise.seeded([1, 2]))
        torch.testing.assert_close(together[1:], painted(SAMPLERS[name], 3, alone, noise=Noise.seeded([2])))


@pytest.mark.parametrize("name", ["dpm", "unipc"])
def test_a_sampler_that_remembers_forgets_what_it_saw_before_it_went_back(name):
    start = Repaint(SAMPLERS[name], Canvas(torch.zeros(1, 1, 1, 2), mask_B1HW=RIGHT))
    x, noise = torch.randn(1, 1, 1, 2), Noise.seeded(0)
    first, second, third, *_ = resampled(steps_of((900, 500, 0)), 2)
    assert isinstance(first, Return)
    _, back = start.advance(x, exact(x, first.t), first, noise)
    assert back.sampler is SAMPLERS[name]
    _, on = back.advance(x, exact(x, second.t), second, noise)
    assert on.sampler is not SAMPLERS[name]
    _, back = on.advance(x, exact(x, third.t), third, noise)
    assert back.sampler is SAMPLERS[name]


def test_ddim_goes_from_entry_to_entry_of_the_table():
    assert by_the_table(Implicit(SCHEDULE, stride=20)).stride is None
    assert by_the_table(SAMPLERS["dpm"]) is SAMPLERS["dpm"]


def test_only_a_noised_canvas_is_painted_so():
    canvas = Canvas(torch.zeros(1, 1, 1, 2), mask_B1HW=RIGHT)
    assert repainting(SAMPLERS["dpm"], canvas) is SAMPLERS["dpm"]
    with pytest.raises(ValueError, match="nothing to keep"):
        NoisedCanvas.of(Canvas(torch.zeros(1, 1, 1, 2)))


def test_what_is_handed_out_of_a_widened_canvas_keeps_every_bit():
    picture = torch.rand(1, 3, 5, 7)
    mask = torch.zeros(1, 1, 5, 7)
    mask[..., 2:] = 1
    canvas = Canvas(picture, mask_B1HW=mask).widened(4)

    def predict(x_BCHW, t):
        assert x_BCHW.shape == (1, 3, 8, 8)
        return Prediction(torch.tanh(x_BCHW))

    x = painted(SAMPLERS["ddpm"], 2, canvas, predict)
    assert x.shape == picture.shape
    assert torch.equal(x[..., :2], picture[..., :2])
    assert x.isfinite().all()
