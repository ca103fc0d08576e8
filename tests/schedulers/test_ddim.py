import pytest
import torch

from floyd import DDIMScheduler, DDPMScheduler
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Implicit, Prediction
from floyd.diffusion.timesteps import steps_of
from floyd.errors import ConfigError

X4_CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("overrides", [{}, {"timestep_spacing": "linspace"}, {"set_alpha_to_one": True}])
def test_a_chain_of_the_upscaler_equals_the_incumbents_to_the_last_bit(eta, overrides):
    import diffusers

    ours, theirs = DDIMScheduler(**X4_CONFIG | overrides), diffusers.DDIMScheduler(**X4_CONFIG | overrides)
    theirs.set_timesteps(12)
    draws, generator, their_generator = (torch.Generator().manual_seed(s) for s in (0, 1, 1))
    x = their_x = torch.randn(1, 4, 8, 8, generator=draws)
    sampler = ours.sampler(12, eta=eta)
    for step in steps_of(ours.timesteps_for(12)):
        out = torch.randn(1, 4, 8, 8, generator=draws)
        x, _ = sampler.step(x, Prediction(out), step, Noise(generator))
        their_x = theirs.step(out, step.t, their_x, eta=eta, generator=their_generator).prev_sample
        assert torch.equal(x, their_x)
    assert torch.equal(generator.get_state(), their_generator.get_state())


def test_without_a_count_a_sampler_follows_the_table():
    scheduler = DDIMScheduler(**X4_CONFIG)
    assert scheduler.sampler(75).stride == 13
    assert scheduler.sampler().stride is None


def test_the_table_and_the_stride_agree_where_the_spacing_is_leading():
    scheduler = DDIMScheduler(**X4_CONFIG)
    x, out = torch.randn(2, 1, 4, 8, 8)
    for step in steps_of(scheduler.timesteps_for(10)):
        by_stride, by_table = (scheduler.sampler(n).step(x, Prediction(out), step, Noise()).x_BCHW for n in (10, None))
        assert torch.equal(by_stride, by_table)


def test_a_model_that_predicts_its_variance_can_be_sampled_after_a_swap():
    scheduler = DDIMScheduler.from_config(DDPMScheduler(variance_type="learned_range").config)
    pred = Prediction(*torch.randn(2, 1, 3, 4, 4))
    step = steps_of(scheduler.timesteps_for(10))[0]
    x = scheduler.sampler(10).step(torch.randn(1, 3, 4, 4), pred, step, Noise()).x_BCHW
    assert x.shape == (1, 3, 4, 4)


def test_eta_and_the_number_of_steps_reach_the_sampler():
    sampler = DDIMScheduler(**X4_CONFIG).sampler(50, eta=0.3)
    assert isinstance(sampler, Implicit)
    assert (sampler.eta, sampler.stride, sampler.ends_clean, sampler.limit) == (0.3, 20, False, None)


@pytest.mark.parametrize("count", [0, 1001])
def test_a_count_that_cannot_be_strided_is_refused(count):
    with pytest.raises(ValueError, match="num_inference_steps must be in"):
        DDIMScheduler().sampler(count)


def test_an_eta_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 2"):
        DDIMScheduler().sampler(10, eta=2)


def test_an_end_that_is_neither_clean_nor_not_is_refused():
    with pytest.raises(ConfigError, match="set_alpha_to_one must be true or false, got 'false'"):
        DDIMScheduler(set_alpha_to_one="false")
