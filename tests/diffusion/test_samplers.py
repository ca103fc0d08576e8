"""B images  C channels  H height  W width"""

import dataclasses
import math

import pytest
import torch

from floyd.diffusion.limits import Clip, DynamicThreshold
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Ancestral, Implicit, Prediction, clean_of, noise_of
from floyd.diffusion.schedule import NoiseSchedule
from floyd.diffusion.timesteps import Step, fast27_timesteps, leading, steps_of, trailing

SHAPE = (2, 3, 8, 8)
LIMITS = {
    "unlimited": (None, {"clip_sample": False}),
    "clip": (Clip(2.0), {"clip_sample": True, "clip_sample_range": 2.0}),
    "stage I": (
        DynamicThreshold(0.95, 1.5),
        {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5},
    ),
    "stage II": (
        DynamicThreshold(0.95, 1.0),
        {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.0},
    ),
}
VARIANCES = ["learned_range", "fixed_small", "fixed_small_log", "fixed_large"]


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("table", [leading(12), fast27_timesteps], ids=["leading", "custom"])
def test_an_ancestral_chain_equals_the_incumbents_to_the_last_bit(limit, prediction, variance, table):
    from diffusers import DDPMScheduler

    ours_limit, theirs_limit = LIMITS[limit]
    schedule = NoiseSchedule.cosine()
    ours = Ancestral(schedule, prediction=prediction, variance=variance, limit=ours_limit)
    theirs = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction, variance_type=variance, **theirs_limit
    )
    theirs.set_timesteps(timesteps=list(table)) if table is fast27_timesteps else theirs.set_timesteps(len(table))
    generator, their_generator = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x = their_x = random(0, *SHAPE)
    for step in steps_of(table):
        target, fraction = random(step.t, *SHAPE), random(step.t + 5000, *SHAPE).clamp(-1, 1)
        out = torch.cat([target, fraction], 1) if variance == "learned_range" else target
        x, clean = ours.step(x, Prediction(target, fraction), step, Noise(generator))
        their_x, their_clean = theirs.step(out, step.t, their_x, generator=their_generator, return_dict=False)
        assert torch.equal(x, their_x)
        assert torch.equal(clean, their_clean)
    assert torch.equal(generator.get_state(), their_generator.get_state())


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("config", [{"steps_offset": 1, "set_alpha_to_one": False}, {"timestep_spacing": "trailing"}])
def test_an_implicit_chain_equals_the_incumbents_to_the_last_bit(limit, prediction, eta, config):
    from diffusers import DDIMScheduler

    ours_limit, theirs_limit = LIMITS[limit]
    ours = Implicit(
        NoiseSchedule.scaled_linear(),
        prediction=prediction,
        limit=ours_limit,
        eta=eta,
        stride=1000 // 15,
        ends_clean=config.get("set_alpha_to_one", True),
    )
    theirs = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction, **theirs_limit, **config)
    theirs.set_timesteps(15)
    generator, their_generator = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x = their_x = random(0, *SHAPE)
    for step in steps_of(theirs.timesteps.tolist()):
        target = random(step.t, *SHAPE)
        x, clean = ours.step(x, Prediction(target), step, Noise(generator))
        their_x, their_clean = theirs.step(
            target, step.t, their_x, eta=eta, generator=their_generator, return_dict=False
        )
        assert torch.equal(x, their_x)
        assert torch.equal(clean, their_clean)
    assert torch.equal(generator.get_state(), their_generator.get_state())


def exact_noise(x, t, schedule, mean, std):
    """The best possible noise prediction where pictures are draws of N(mean, std^2), by conjugacy."""
    abar = schedule.alpha_bar(t)
    return (1 - abar) ** 0.5 * (x - abar**0.5 * mean) / (abar * std**2 + 1 - abar)


@pytest.mark.parametrize("mean", [0.4, -1.0])
@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(NoiseSchedule.cosine(), variance="fixed_small", limit=None),
        Ancestral(NoiseSchedule.cosine(), variance="fixed_large", limit=None),
        Ancestral(NoiseSchedule.linear(), variance="fixed_small", limit=None),
        Implicit(NoiseSchedule.cosine(), limit=None),
        Implicit(NoiseSchedule.cosine(), limit=None, eta=1.0),
        Implicit(NoiseSchedule.scaled_linear(), limit=None, stride=5),
    ],
    ids=["ancestral", "ancestral-large", "ancestral-linear", "implicit", "implicit-noisy", "implicit-stride"],
)
def test_a_perfect_prediction_recovers_the_distribution_of_the_pictures(sampler, mean):
    std, noise = 0.5, Noise.seeded(0)
    x = noise.normal((1, 1, 100, 200))
    for step in steps_of(trailing(200)):
        x, _ = sampler.step(x, Prediction(exact_noise(x, step.t, sampler.schedule, mean, std)), step, noise)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(std, abs=0.02)


def test_more_steps_bring_the_spread_closer():
    def error(count):
        noise = Noise.seeded(0)
        sampler = Ancestral(NoiseSchedule.cosine(), variance="fixed_small", limit=None)
        x = noise.normal((1, 1, 100, 100))
        for step in steps_of(trailing(count)):
            x, _ = sampler.step(x, Prediction(exact_noise(x, step.t, sampler.schedule, 0.0, 0.5)), step, noise)
        return abs(x.std().item() - 0.5)

    assert error(5) > error(20) > error(100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler_class", [Ancestral, Implicit])
def test_half_precision_predictions_give_finite_float32_pictures(dtype, sampler_class):
    sampler = sampler_class(NoiseSchedule.cosine(), limit=DynamicThreshold(0.95, 1.5))
    x, noise = random(0, *SHAPE).to(dtype), Noise.seeded(0)
    for step in steps_of(trailing(20)):
        pred = Prediction((8 * random(step.t, *SHAPE)).to(dtype), random(step.t + 1, *SHAPE).to(dtype))
        x, clean = sampler.step(x, pred, step, noise)
        assert x.dtype == clean.dtype == torch.float32
        assert x.isfinite().all()
        assert clean.abs().max() <= 1


@pytest.mark.parametrize("sampler", [Ancestral(NoiseSchedule.cosine()), Implicit(NoiseSchedule.cosine(), eta=1.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_in_half_precision_is_the_step_in_float32(sampler, dtype):
    x, *pred = (random(seed, *SHAPE).to(dtype) for seed in range(3))
    half = sampler.step(x, Prediction(*pred), Step(0, 900, 800), Noise.seeded(0))
    full = sampler.step(x.float(), Prediction(*(p.float() for p in pred)), Step(0, 900, 800), Noise.seeded(0))
    assert torch.equal(half.x_BCHW, full.x_BCHW)
    assert torch.equal(half.clean_BCHW, full.clean_BCHW)


def test_overflow_in_the_network_leaves_no_holes_in_the_picture():
    target = random(0, *SHAPE)
    target[:, :, :4] = torch.inf
    sampler = Ancestral(NoiseSchedule.cosine(), variance="fixed_small", limit=DynamicThreshold(0.95, 1.5))
    x, clean = sampler.step(random(1, *SHAPE), Prediction(target), Step(0, 999, 900), Noise.seeded(0))
    assert x.isfinite().all()
    assert clean.isfinite().all()


@pytest.mark.parametrize("variance", [*VARIANCES, "fixed_large_log"])
def test_a_table_that_ends_above_zero_ends_without_noise(variance):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    sampler = Ancestral(NoiseSchedule.cosine(), variance=variance)
    x, clean = sampler.step(
        random(0, *SHAPE), Prediction(random(1, *SHAPE), 9 * random(2, *SHAPE)), Step(7, 33, -1), Noise(generator)
    )
    torch.testing.assert_close(x, clean)
    assert torch.equal(generator.get_state(), before)


def test_an_implicit_custom_table_ends_without_noise_too():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    sampler = Implicit(NoiseSchedule.cosine(), eta=1.0)
    x, clean = sampler.step(random(0, *SHAPE), Prediction(random(1, *SHAPE)), Step(7, 33, -1), Noise(generator))
    torch.testing.assert_close(x, clean)
    assert torch.equal(generator.get_state(), before)


def test_without_eta_an_implicit_chain_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    sampler = Implicit(NoiseSchedule.cosine())
    x = random(0, *SHAPE)
    for step in steps_of(leading(5)):
        x, _ = sampler.step(x, Prediction(random(step.t, *SHAPE)), step, Noise(generator))
    assert torch.equal(generator.get_state(), before)


def test_the_two_log_variances_are_the_plain_ones():
    for plain, log in (("fixed_small", "fixed_small_log"), ("fixed_large", "fixed_large_log")):
        x = {
            variance: Ancestral(NoiseSchedule.cosine(), variance=variance)
            .step(random(0, *SHAPE), Prediction(random(1, *SHAPE)), Step(0, 500, 480), Noise.seeded(0))
            .x_BCHW
            for variance in (plain, log)
        }
        torch.testing.assert_close(x[plain], x[log])


@pytest.mark.parametrize(("fraction", "fixed"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_learned_range_spans_the_two_fixed_variances(fraction, fixed):
    def x(variance):
        sampler = Ancestral(NoiseSchedule.cosine(), variance=variance)
        pred = Prediction(random(1, *SHAPE), torch.full(SHAPE, fraction))
        return sampler.step(random(0, *SHAPE), pred, Step(0, 500, 480), Noise.seeded(0)).x_BCHW

    torch.testing.assert_close(x("learned_range"), x(fixed))


@pytest.mark.parametrize("t", [1, 500, 990])
def test_every_kind_of_prediction_tells_of_the_same_picture_and_noise(t):
    schedule = NoiseSchedule.cosine()
    clean, noise = random(0, *SHAPE), random(1, *SHAPE)
    x, abar = schedule.noised(clean, noise, t), schedule.alpha_bar(t)
    targets = {"epsilon": noise, "v_prediction": schedule.velocity(clean, noise, t), "sample": clean}
    for prediction, target in targets.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-6 / math.sqrt(abar.item() * (1 - abar.item()))}
        torch.testing.assert_close(clean_of(prediction, x, target, abar), clean, **tolerance)
        torch.testing.assert_close(noise_of(prediction, x, target, abar), noise, **tolerance)


def test_a_schedule_that_ends_in_pure_noise_can_be_sampled_by_velocity():
    schedule = NoiseSchedule.scaled_linear().with_zero_terminal_snr()
    for sampler in (Ancestral(schedule, prediction="v_prediction", variance="fixed_small"), Implicit(schedule)):
        sampler = dataclasses.replace(sampler, prediction="v_prediction")
        x, noise = random(0, *SHAPE), Noise.seeded(0)
        for step in steps_of(trailing(10)):
            x, _ = sampler.step(x, Prediction(random(step.t, *SHAPE)), step, noise)
        assert x.isfinite().all()


def test_a_step_edits_neither_x_nor_the_prediction():
    x, pred = random(0, *SHAPE), Prediction(random(1, *SHAPE), random(2, *SHAPE))
    for sampler in (Ancestral(NoiseSchedule.cosine()), Implicit(NoiseSchedule.cosine(), eta=1.0)):
        sampler.step(x, pred, Step(0, 500, 480), Noise.seeded(0))
    assert torch.equal(x, random(0, *SHAPE))
    assert torch.equal(pred.target_BCHW, random(1, *SHAPE))
    assert torch.equal(pred.variance_BCHW, random(2, *SHAPE))


def test_a_learned_variance_that_is_missing_is_named():
    with pytest.raises(ValueError, match="use 'fixed_small' or 'fixed_large'"):
        Ancestral(NoiseSchedule.cosine()).step(
            random(0, *SHAPE), Prediction(random(1, *SHAPE)), Step(0, 500, 480), Noise()
        )


@pytest.mark.parametrize(
    ("sampler", "wrong"),
    [
        (Ancestral, {"variance": "learned"}),
        (Ancestral, {"prediction": "score"}),
        (Implicit, {"prediction": "score"}),
        (Implicit, {"eta": -0.1}),
        (Implicit, {"eta": 1.5}),
        (Implicit, {"stride": 0}),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(sampler, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sampler(NoiseSchedule.cosine(), **wrong)


@pytest.mark.parametrize("sampler", [Ancestral(NoiseSchedule.cosine()), Implicit(NoiseSchedule.cosine())])
def test_a_sampler_cannot_be_changed(sampler):
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.limit = None
