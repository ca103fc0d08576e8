import inspect
import json
import math

import pytest
import torch

from floyd import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from floyd.diffusion.limits import DynamicThreshold
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Prediction
from floyd.diffusion.timesteps import fast27_timesteps, steps_of
from floyd.errors import ConfigError

# The incumbent makes numpy arrays of tensors, which newer numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BOTH = pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
IF_CONFIG = {
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "dynamic_thresholding_ratio": 0.95,
    "lambda_min_clipped": -5.1,
    "sample_max_value": 1.5,
    "thresholding": True,
    "variance_type": "learned_range",
}
UNLIMITED = {"thresholding": False, "clip_sample": False}


def incumbent(scheduler_class):
    import diffusers

    return getattr(diffusers, scheduler_class.__name__)


def walks_like_the_incumbent(ours, theirs, table, outputs=3, close=1e-5):
    """Both along one table, on random predictions; returns the generators."""
    draws, generator, their_generator = (torch.Generator().manual_seed(s) for s in (0, 1, 1))
    sampler = ours.sampler()
    x = their_x = torch.randn(2, 3, 8, 8, generator=draws)
    takes_generator = "generator" in inspect.signature(theirs.step).parameters
    extra = {"generator": their_generator} if takes_generator else {}
    for step in steps_of(table):
        out = torch.randn(2, outputs, 8, 8, generator=draws)
        (x, _), sampler = sampler.advance(x, Prediction(out[:, :3]), step, Noise(generator))
        their_x = theirs.step(out, step.t, their_x, **extra).prev_sample
        torch.testing.assert_close(x, their_x, rtol=close, atol=close * max(1, their_x.abs().max().item()))
    assert torch.equal(generator.get_state(), their_generator.get_state())


@BOTH
def test_the_keys_and_their_defaults_are_the_incumbents(scheduler_class):
    theirs = inspect.signature(incumbent(scheduler_class)).parameters
    assert scheduler_class().config.to_json() == {name: p.default for name, p in theirs.items()}


@BOTH
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("count", [1, 10, 27])
def test_the_timesteps_of_a_count_are_the_incumbents(scheduler_class, spacing, count):
    config = IF_CONFIG | {"timestep_spacing": spacing, "steps_offset": 1}
    theirs = incumbent(scheduler_class).from_config(config)
    theirs.set_timesteps(count)
    assert list(scheduler_class.from_config(config).timesteps_for(count)) == theirs.timesteps.tolist()


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"solver_type": "heun"},
        {"solver_order": 1},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "timestep_spacing": "trailing"},
        {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"} | UNLIMITED,
        {"prediction_type": "sample", "rescale_betas_zero_snr": True},
    ],
)
def test_a_chain_of_dpm_solver_equals_the_incumbents(algorithm, overrides):
    config = IF_CONFIG | {"variance_type": None, "algorithm_type": algorithm} | overrides
    ours = DPMSolverMultistepScheduler.from_config(config)
    theirs = incumbent(type(ours)).from_config(config)
    theirs.set_timesteps(10)
    walks_like_the_incumbent(ours, theirs, ours.timesteps_for(10))


def test_dpm_solver_walks_a_custom_table_as_the_incumbent():
    ours = DPMSolverMultistepScheduler.from_config(IF_CONFIG)
    theirs = incumbent(type(ours)).from_config(IF_CONFIG)
    theirs.set_timesteps(timesteps=list(fast27_timesteps))
    # Theirs subtracts the logarithms of neighbouring noise levels in single precision, ours in double.
    walks_like_the_incumbent(ours, theirs, fast27_timesteps, outputs=6, close=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},  # ending clean, the incumbent arrives at nan
        {"solver_order": 1},
        {"disable_corrector": [0, 3]},
        {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"} | UNLIMITED,
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    ],
)
def test_a_chain_of_unipc_equals_the_incumbents(overrides):
    config = IF_CONFIG | {"variance_type": None} | overrides
    ours = UniPCMultistepScheduler.from_config(config)
    theirs = incumbent(type(ours)).from_config(config)
    theirs.set_timesteps(10)
    walks_like_the_incumbent(ours, theirs, ours.timesteps_for(10))


def test_the_configuration_of_if_begins_where_its_signal_begins():
    stage = DDPMScheduler.from_config(IF_CONFIG)
    assert DPMSolverMultistepScheduler.from_config(stage.config).timesteps_for(25)[0] == 995
    assert DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2").timesteps_for(25)[0] == 999


@BOTH
def test_swaps_keep_foreign_keys_and_the_limit_and_come_back(scheduler_class):
    stage = DDPMScheduler.from_config(IF_CONFIG | {"something": 1})
    swapped = scheduler_class.from_config(stage.config)
    assert swapped.config["something"] == 1
    assert swapped.config["lambda_min_clipped"] == -5.1
    assert swapped.limit == swapped.sampler(9).limit == DynamicThreshold(0.95, 1.5)
    there = EulerDiscreteScheduler.from_config(swapped.config)
    assert there.limit == DynamicThreshold(0.95, 1.5)
    back = DDPMScheduler.from_config(there.config)
    assert dict(back.config).items() >= dict(stage.config).items()


@BOTH
def test_a_spacing_nobody_chose_is_not_carried_over(scheduler_class):
    assert scheduler_class.from_config(DDIMScheduler().config).config.timestep_spacing == "linspace"
    chosen = DDIMScheduler(timestep_spacing="trailing")
    assert scheduler_class.from_config(chosen.config).config.timestep_spacing == "trailing"
    assert scheduler_class.from_config(DDIMScheduler().config, timestep_spacing="leading").config.timestep_spacing == (
        "leading"
    )


def test_the_solvers_understand_each_others_solver_types():
    unipc = UniPCMultistepScheduler.from_config(DPMSolverMultistepScheduler(solver_type="heun").config)
    assert unipc.config.solver_type == "bh2"
    assert DPMSolverMultistepScheduler.from_config(unipc.config).config.solver_type == "midpoint"
    assert DPMSolverMultistepScheduler(algorithm_type="deis").config.algorithm_type == "dpmsolver++"


@pytest.mark.parametrize(
    ("scheduler_class", "key", "value"),
    [
        *((c, "solver_order", 3) for c in (DPMSolverMultistepScheduler, UniPCMultistepScheduler)),
        *((c, "use_karras_sigmas", True) for c in (DPMSolverMultistepScheduler, UniPCMultistepScheduler)),
        *((c, "final_sigmas_type", "one") for c in (DPMSolverMultistepScheduler, UniPCMultistepScheduler)),
        *((c, "lower_order_final", 1) for c in (DPMSolverMultistepScheduler, UniPCMultistepScheduler)),
        *((c, "prediction_type", "flow_prediction") for c in (DPMSolverMultistepScheduler, UniPCMultistepScheduler)),
        (DPMSolverMultistepScheduler, "algorithm_type", "dpmsolver"),
        (DPMSolverMultistepScheduler, "solver_type", "rk4"),
        (DPMSolverMultistepScheduler, "lambda_min_clipped", "low"),
        (DPMSolverMultistepScheduler, "variance_type", "wide"),
        (DPMSolverMultistepScheduler, "use_lu_lambdas", True),
        (UniPCMultistepScheduler, "predict_x0", False),
        (UniPCMultistepScheduler, "solver_type", "bh3"),
        (UniPCMultistepScheduler, "sigma_max", 5.0),
        (UniPCMultistepScheduler, "solver_p", "ddim"),
        (UniPCMultistepScheduler, "disable_corrector", ["0"]),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused(scheduler_class, key, value):
    with pytest.raises(ConfigError, match=f"{key} must "):
        scheduler_class(**{key: value})


def test_a_clip_that_leaves_no_timestep_is_refused():
    with pytest.raises(ConfigError, match="lambda_min_clipped must be below"):
        DPMSolverMultistepScheduler(lambda_min_clipped=100.0).timesteps_for(5)


@BOTH
@pytest.mark.parametrize("count", [0, 1000])
def test_a_count_without_room_is_refused(scheduler_class, count):
    with pytest.raises(ValueError, match=r"must be in \[1, 1000\)"):
        scheduler_class().timesteps_for(count)


@BOTH
def test_an_eta_that_cannot_take_effect_is_announced(scheduler_class):
    with pytest.warns(UserWarning, match=f"eta=0.5 has no effect with {scheduler_class.__name__}"):
        scheduler_class().sampler(10, eta=0.5)


@BOTH
def test_what_is_saved_is_read_by_the_incumbent_and_by_us(scheduler_class, tmp_path):
    ours = scheduler_class.from_config(IF_CONFIG)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == scheduler_class.__name__
    theirs = incumbent(scheduler_class).from_pretrained(tmp_path)
    assert torch.equal(theirs.alphas_cumprod, ours.schedule.alpha_bar_T)
    assert dict(scheduler_class.from_pretrained(tmp_path).config).items() >= dict(ours.config).items()


def test_the_default_clip_clips_nothing():
    assert DPMSolverMultistepScheduler().config.lambda_min_clipped == -math.inf
