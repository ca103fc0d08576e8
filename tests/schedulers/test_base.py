import inspect
import json

import pytest
import torch

import floyd
from floyd import DDIMScheduler, DDPMScheduler
from floyd.diffusion.limits import Clip, DynamicThreshold
from floyd.diffusion.timesteps import TABLES, respaced, trailing
from floyd.errors import ConfigError

BOTH = pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
STAGE_I = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.15.0.dev0",
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.95,
    "lambda_min_clipped": -5.1,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.5,
    "thresholding": True,
    "trained_betas": None,
    "variance_type": "learned_range",
}


def incumbent(scheduler_class):
    import diffusers

    return getattr(diffusers, scheduler_class.__name__)


@BOTH
def test_the_keys_and_their_defaults_are_the_incumbents(scheduler_class):
    theirs = inspect.signature(incumbent(scheduler_class)).parameters
    assert dict(scheduler_class().config) == {name: p.default for name, p in theirs.items()}


@BOTH
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    ],
)
def test_the_noise_schedule_equals_the_incumbents_to_the_last_bit(scheduler_class, config):
    theirs = incumbent(scheduler_class)(**config)
    assert torch.equal(scheduler_class(**config).schedule.alpha_bar_T, theirs.alphas_cumprod)


def test_betas_of_numpy_will_do():
    betas = torch.tensor([0.25, 0.5])
    scheduler = DDPMScheduler(trained_betas=betas.numpy(), num_train_timesteps=2)
    assert scheduler.config.trained_betas == (0.25, 0.5)
    assert json.loads(json.dumps(scheduler.config.to_json()))["trained_betas"] == [0.25, 0.5]


@BOTH
@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("beta_schedule", "laplace", "linear, scaled_linear, squaredcos_cap_v2, sigmoid"),
        ("prediction_type", "score", "epsilon, v_prediction, sample"),
        ("timestep_spacing", "karras", "leading, linspace, trailing"),
        ("num_train_timesteps", 0, "at least 1"),
        ("num_train_timesteps", "1000", "whole number"),
        ("steps_offset", -1, "at least 0"),
        ("steps_offset", 0.5, "whole number"),
        ("thresholding", "false", "true or false"),
        ("clip_sample_range", 0.0, "positive number"),
        ("sample_max_value", -1.0, "positive"),
        ("dynamic_thresholding_ratio", 95, r"in \[0, 1\]"),
        ("beta_start", -0.1, r"in \[0, 1\]"),
        ("beta_end", 20, r"in \[0, 1\]"),
        ("trained_betas", [0.1, 0.2], "got 2"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_with_the_allowed_ones(scheduler_class, key, value, allowed):
    with pytest.raises(ConfigError, match=f"{key} must .*{allowed}"):
        scheduler_class(**{key: value})
    with pytest.raises(ConfigError, match=f"{key} must .*{allowed}"):
        scheduler_class.from_config({key: value})


def test_trained_betas_outside_their_range_are_refused():
    with pytest.raises(ConfigError, match="trained_betas must lie"):
        DDPMScheduler(trained_betas=[0.1, 1.2], num_train_timesteps=2)


@BOTH
def test_a_misspelt_keyword_is_refused(scheduler_class):
    with pytest.raises(TypeError, match="beta_shedule"):
        scheduler_class(beta_shedule="linear")


def test_foreign_keys_survive_a_swap_and_overrides_win():
    stage = DDPMScheduler.from_config(STAGE_I)
    assert stage.config.lambda_min_clipped == -5.1
    swapped = DDIMScheduler.from_config(stage.config, steps_offset=1)
    assert swapped.config["variance_type"] == "learned_range"
    assert swapped.config.lambda_min_clipped == -5.1
    assert swapped.config.steps_offset == 1
    back = DDPMScheduler.from_config(swapped.config, variance_type="fixed_small")
    assert back.config.variance_type == "fixed_small"
    assert back.config.set_alpha_to_one is True
    assert torch.equal(back.schedule.alpha_bar_T, stage.schedule.alpha_bar_T)


@BOTH
def test_thresholding_replaces_clipping(scheduler_class):
    assert scheduler_class().limit == Clip(1.0)
    assert scheduler_class(clip_sample=False).limit is None
    assert scheduler_class.from_config(STAGE_I).limit == DynamicThreshold(0.95, 1.5)
    assert scheduler_class.from_config(STAGE_I).sampler(10).limit == DynamicThreshold(0.95, 1.5)


@BOTH
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_timesteps_of_a_count_are_the_incumbents(scheduler_class, spacing):
    config = {"timestep_spacing": spacing, "steps_offset": 1}
    theirs = incumbent(scheduler_class)(**config)
    for count in (1, 27, 75):
        theirs.set_timesteps(count)
        assert list(scheduler_class(**config).timesteps_for(count)) == theirs.timesteps.tolist()


@BOTH
def test_timesteps_may_be_a_table_or_a_respacing_string(scheduler_class):
    scheduler = scheduler_class()
    assert scheduler.timesteps_for(timesteps=[900, 100, 0]) == (900, 100, 0)
    assert scheduler.timesteps_for(timesteps="fast27") == TABLES["fast27"]
    assert scheduler_class(num_train_timesteps=100).timesteps_for(timesteps="7") == respaced("7", 100)
    assert scheduler_class(num_train_timesteps=100, timestep_spacing="trailing").timesteps_for(7) == trailing(7, 100)


@BOTH
@pytest.mark.parametrize("given", [{}, {"num_inference_steps": 3, "timesteps": [2, 1, 0]}])
def test_timesteps_need_exactly_one_of_count_and_table(scheduler_class, given):
    with pytest.raises(ValueError, match="either num_inference_steps or timesteps"):
        scheduler_class().timesteps_for(**given)


@BOTH
@pytest.mark.parametrize("table", [[5, 9], [1000], []])
def test_a_table_that_cannot_be_walked_is_refused(scheduler_class, table):
    with pytest.raises(ValueError, match="timesteps must"):
        scheduler_class().timesteps_for(timesteps=table)


@BOTH
def test_added_noise_is_the_incumbents_to_the_last_bit(scheduler_class):
    clean, noise = torch.randn(2, 2, 3, 4, 4)
    t_B = torch.tensor([20, 700])
    ours = scheduler_class(beta_schedule="squaredcos_cap_v2")
    theirs = incumbent(scheduler_class)(beta_schedule="squaredcos_cap_v2")
    assert torch.equal(ours.add_noise(clean, noise, t_B), theirs.add_noise(clean, noise, t_B))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDPMScheduler", STAGE_I),
        ("DDPMScheduler", {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}),
        (
            "DDIMScheduler",
            {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "skip_prk_steps": True},
        ),
    ],
)
def test_the_incumbent_reads_what_we_save_and_we_what_it_saves(name, config, tmp_path):
    ours = getattr(floyd, name).from_config(config)
    ours.save_pretrained(tmp_path / "ours")
    theirs = incumbent(type(ours)).from_pretrained(tmp_path / "ours")
    assert torch.equal(theirs.alphas_cumprod, ours.schedule.alpha_bar_T)
    theirs.save_pretrained(tmp_path / "theirs")
    again = type(ours).from_pretrained(tmp_path / "theirs")
    known = ours.config.known_keys()
    assert [again.config[key] for key in known] == [ours.config[key] for key in known]
    for key in config.keys() - {"_class_name", "_diffusers_version"}:
        assert again.config.to_json()[key] == config[key]
    written = json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())
    assert written["_class_name"] == name


def test_a_swapped_scheduler_is_saved_under_its_own_class(tmp_path):
    DDIMScheduler.from_config(STAGE_I).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    assert DDPMScheduler.from_pretrained(tmp_path).config.variance_type == "learned_range"


def test_a_saved_scheduler_may_be_loaded_with_other_values(tmp_path):
    DDPMScheduler.from_config(STAGE_I).save_pretrained(tmp_path)
    assert DDPMScheduler.from_pretrained(tmp_path, variance_type="fixed_small").config.variance_type == "fixed_small"
