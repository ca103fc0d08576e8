import pytest
import torch

from floyd import DDPMScheduler
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Ancestral, Prediction
from floyd.diffusion.timesteps import steps_of
from floyd.errors import ConfigError

IF_CONFIG = {
    "beta_schedule": "squaredcos_cap_v2",
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
    "thresholding": True,
    "variance_type": "learned_range",
}


@pytest.mark.parametrize("overrides", [{}, {"sample_max_value": 1.0}, {"timestep_spacing": "linspace"}])
def test_a_chain_of_if_equals_the_incumbents_to_the_last_bit(overrides):
    import diffusers

    ours, theirs = DDPMScheduler(**IF_CONFIG | overrides), diffusers.DDPMScheduler(**IF_CONFIG | overrides)
    theirs.set_timesteps(10)
    draws, generator, their_generator = (torch.Generator().manual_seed(s) for s in (0, 1, 1))
    x = their_x = torch.randn(2, 3, 8, 8, generator=draws)
    for step in steps_of(ours.timesteps_for(10)):
        out = torch.randn(2, 6, 8, 8, generator=draws)
        x, _ = ours.sampler().step(x, Prediction(*out.chunk(2, 1)), step, Noise(generator))
        their_x = theirs.step(out, step.t, their_x, generator=their_generator).prev_sample
        assert torch.equal(x, their_x)
    assert torch.equal(generator.get_state(), their_generator.get_state())


def test_each_call_gets_a_sampler_of_its_own():
    scheduler = DDPMScheduler(**IF_CONFIG, prediction_type="v_prediction")
    sampler = scheduler.sampler(50)
    assert isinstance(sampler, Ancestral)
    assert sampler is not scheduler.sampler(50)
    assert (sampler.prediction, sampler.variance) == ("v_prediction", "learned_range")


def test_an_eta_that_cannot_take_effect_is_announced():
    with pytest.warns(UserWarning, match="eta=0.5 has no effect with DDPMScheduler"):
        DDPMScheduler().sampler(10, eta=0.5)


@pytest.mark.parametrize("variance_type", ["learned", "huge"])
def test_a_variance_that_cannot_be_honoured_is_refused(variance_type):
    with pytest.raises(ConfigError, match=r"variance_type must be one of fixed_small, .*learned_range"):
        DDPMScheduler(variance_type=variance_type)
