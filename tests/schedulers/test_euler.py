import inspect

import pytest
import torch

from floyd import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from floyd.diffusion.limits import Clip, DynamicThreshold
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Prediction, Remembering
from floyd.errors import ConfigError

# The incumbent makes numpy arrays of tensors, which newer numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLASSES = [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler]
ALL = pytest.mark.parametrize("scheduler_class", CLASSES)
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def incumbent(scheduler_class):
    import diffusers

    return getattr(diffusers, scheduler_class.__name__)


@ALL
def test_the_keys_and_their_defaults_are_the_incumbents(scheduler_class):
    theirs = inspect.signature(incumbent(scheduler_class)).parameters
    assert scheduler_class().config.to_json() == {name: p.default for name, p in theirs.items()}


@ALL
@pytest.mark.parametrize(
    "config",
    [
        {},
        COSINE | {"timestep_spacing": "leading", "steps_offset": 1},
        {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ],
)
def test_a_chain_equals_the_incumbents_scaled_to_unit_variance(scheduler_class, config):
    ours, theirs = scheduler_class(**config), incumbent(scheduler_class)(**config)
    theirs.set_timesteps(10)
    sampler, steps = ours.sampler(10), ours.steps(ours.timesteps_for(10))
    assert [step.t for step in steps] == theirs.timesteps.tolist()

    draws, generator, their_generator = (torch.Generator().manual_seed(s) for s in (0, 1, 1))
    x = torch.randn(2, 3, 8, 8, generator=draws)
    their_x = x * (theirs.sigmas[0] ** 2 + 1) ** 0.5
    extra = {"generator": their_generator} if "generator" in inspect.signature(theirs.step).parameters else {}
    for step, t in zip(steps, theirs.timesteps, strict=True):
        their_input = theirs.scale_model_input(their_x, t)
        torch.testing.assert_close(x, their_input, rtol=1e-5, atol=1e-5 * their_input.abs().max().item())
        out = torch.randn(2, 3, 8, 8, generator=draws)
        if isinstance(sampler, Remembering):
            (x, _), sampler = sampler.advance(x, Prediction(out), step, Noise(generator))
        else:
            x, _ = sampler.step(x, Prediction(out), step, Noise(generator))
        their_x = theirs.step(out, t, their_x, **extra).prev_sample
    torch.testing.assert_close(x, their_x, rtol=1e-5, atol=1e-5 * their_x.abs().max().item())
    assert torch.equal(generator.get_state(), their_generator.get_state())


def test_heun_does_not_correct_what_leaves_pure_noise():
    """The correction would be thousands of times the difference of two predictions."""
    scheduler = HeunDiscreteScheduler(**COSINE, timestep_spacing="trailing", clip_sample=True)
    steps = scheduler.steps((999, 800, 500, 100))
    assert [(step.t, step.t_prev) for step in steps] == [
        (999, 800), (800, 500), (500, 500), (500, 100), (100, 100), (100, -1),
    ]  # fmt: skip
    mean, std, schedule = 0.4, 0.1, scheduler.schedule
    noise, sampler = Noise.seeded(0), scheduler.sampler()
    x = noise(torch.zeros(1, 3, 64, 64))
    for step in scheduler.steps(scheduler.timesteps_for(8)):
        abar = schedule.alpha_bar(step.t)
        told = (1 - abar) ** 0.5 * (x - abar**0.5 * mean) / (abar * std**2 + 1 - abar)  # of a Gaussian
        (x, _), sampler = sampler.advance(x, Prediction(told * 1.01), step, noise)  # and a little wrong
    assert x.mean().item() == pytest.approx(mean, abs=0.05)
    assert x.std().item() < 2 * std


def test_a_chain_may_end_at_the_smallest_noise_level_of_training():
    config = COSINE | {"final_sigmas_type": "sigma_min"}
    ours, theirs = EulerDiscreteScheduler(**config), incumbent(EulerDiscreteScheduler)(**config)
    theirs.set_timesteps(timesteps=[500, 100])
    theirs.scale_model_input(torch.zeros(1), 500.0)
    x = their_x = torch.randn(1, 3, 8, 8)
    their_x = x * (theirs.sigmas[0] ** 2 + 1) ** 0.5
    for step in ours.steps((500, 100)):
        out = torch.randn(1, 3, 8, 8)
        x = ours.sampler().step(x, Prediction(out), step, Noise()).x_BCHW
        their_x = theirs.step(out, float(step.t), their_x).prev_sample
    torch.testing.assert_close(x * (theirs.sigmas[-1] ** 2 + 1) ** 0.5, their_x, rtol=1e-5, atol=1e-4)


@ALL
def test_the_timesteps_are_the_incumbents_to_the_nearest_whole_number(scheduler_class):
    theirs = incumbent(scheduler_class)()
    theirs.set_timesteps(27)
    ours = scheduler_class()
    table = ours.steps(ours.timesteps_for(27))
    assert len(table) == len(theirs.timesteps)
    assert all(abs(step.t - t) < 0.501 for step, t in zip(table, theirs.timesteps.tolist(), strict=True))


@ALL
def test_the_limit_of_the_model_is_heeded(scheduler_class):
    stage = DDPMScheduler(**COSINE, thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5)
    ours = scheduler_class.from_config(stage.config)
    assert ours.limit == DynamicThreshold(0.95, 1.5)
    x, out = torch.randn(2, 1, 3, 8, 8)
    step = ours.steps(ours.timesteps_for(10))[0]
    assert ours.sampler(10).step(x, Prediction(out, out), step, Noise()).clean_BCHW.abs().max() <= 1
    assert scheduler_class.from_config(DDPMScheduler(clip_sample_range=2.0).config).limit == Clip(2.0)


@ALL
def test_the_noise_schedule_of_the_model_survives_a_swap(scheduler_class):
    stage = DDPMScheduler()
    assert torch.equal(scheduler_class.from_config(stage.config).schedule.alpha_bar_T, stage.schedule.alpha_bar_T)


@pytest.mark.parametrize("scheduler_class", CLASSES[:2])
def test_a_schedule_that_ends_in_pure_noise_stays_finite(scheduler_class):
    ours = scheduler_class(rescale_betas_zero_snr=True)
    step = ours.steps(ours.timesteps_for(10))[0]
    assert step.t == 999
    x, out = torch.randn(2, 1, 3, 8, 8)
    assert ours.sampler(10).step(x, Prediction(out), step, Noise()).x_BCHW.isfinite().all()
    theirs = incumbent(scheduler_class)(rescale_betas_zero_snr=True)
    torch.testing.assert_close(ours.schedule.alpha_bar_T[:-1], theirs.alphas_cumprod[:-1])
    assert 0 < ours.schedule.alpha_bar_T[-1] <= theirs.alphas_cumprod[-1]


@pytest.mark.parametrize(
    ("scheduler_class", "key", "value"),
    [
        (EulerDiscreteScheduler, "use_karras_sigmas", True),
        (EulerDiscreteScheduler, "interpolation_type", "log_linear"),
        (EulerDiscreteScheduler, "timestep_type", "continuous"),
        (EulerDiscreteScheduler, "sigma_min", 0.1),
        (EulerDiscreteScheduler, "final_sigmas_type", "one"),
        (EulerAncestralDiscreteScheduler, "prediction_type", "flow"),
        (HeunDiscreteScheduler, "use_beta_sigmas", True),
        (HeunDiscreteScheduler, "clip_sample", "yes"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused(scheduler_class, key, value):
    with pytest.raises(ConfigError, match=f"{key} must "):
        scheduler_class(**{key: value})


@ALL
def test_an_eta_that_cannot_take_effect_is_announced(scheduler_class):
    with pytest.warns(UserWarning, match=f"eta=0.5 has no effect with {scheduler_class.__name__}"):
        scheduler_class().sampler(10, eta=0.5)


@ALL
def test_what_is_saved_is_read_by_the_incumbent(scheduler_class, tmp_path):
    scheduler_class(**COSINE, timestep_spacing="trailing").save_pretrained(tmp_path)
    assert incumbent(scheduler_class).from_pretrained(tmp_path).config.timestep_spacing == "trailing"
