import copy

import pytest
import torch

from floyd.diffusion.schedule import NoiseSchedule

COSINE = NoiseSchedule.cosine()


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (NoiseSchedule.cosine, "squaredcos_cap_v2"),
        (NoiseSchedule.linear, "linear"),
        (NoiseSchedule.scaled_linear, "scaled_linear"),
        (NoiseSchedule.sigmoid, "sigmoid"),
    ],
)
def test_every_rule_equals_the_incumbents_table_to_the_last_bit(rule, name):
    from diffusers import DDPMScheduler

    for num_steps in (1000, 37):
        theirs = DDPMScheduler(num_train_timesteps=num_steps, beta_schedule=name)
        assert torch.equal(rule(num_steps).alpha_bar_T, theirs.alphas_cumprod)
    theirs = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=True)
    assert torch.equal(rule().with_zero_terminal_snr().alpha_bar_T, theirs.alphas_cumprod)


def test_the_cosine_schedule_has_the_published_values():
    table = {0: 0.99995869, 250: 0.84588802, 500: 0.49228504, 900: 0.023616107, 990: 1.967173e-4, 999: 2.428735e-9}
    for t, alpha_bar in table.items():
        assert COSINE.alpha_bar(t).item() == pytest.approx(alpha_bar, rel=1e-5)


def test_trained_betas_are_compounded():
    torch.testing.assert_close(NoiseSchedule.of_betas([0.1, 0.5]).alpha_bar_T, torch.tensor([0.9, 0.45]))


def test_a_stretched_schedule_ends_in_pure_noise_and_starts_as_before():
    stretched = NoiseSchedule.scaled_linear().with_zero_terminal_snr()
    assert stretched.alpha_bar_T[-1] == 0
    assert stretched.alpha_bar_T[0] == pytest.approx(NoiseSchedule.scaled_linear().alpha_bar_T[0])


def test_before_the_first_timestep_all_of_the_picture_survives():
    assert COSINE.alpha_bar(-1) == 1


@pytest.mark.parametrize("kind", ["noised", "velocity"])
def test_a_timestep_for_each_image_is_that_timestep_for_each_image(kind):
    clean, noise = torch.randn(2, 3, 3, 4, 4)
    mixed = getattr(COSINE, kind)(clean, noise, torch.tensor([0, 250, 999]))
    for i, t in enumerate([0, 250, 999]):
        assert torch.equal(mixed[i], getattr(COSINE, kind)(clean[i : i + 1], noise[i : i + 1], t)[0])


def test_noise_and_velocity_lead_back_to_the_clean_picture():
    clean, noise = torch.randn(2, 1, 3, 4, 4)
    root, rest = COSINE.alpha_bar(600) ** 0.5, (1 - COSINE.alpha_bar(600)) ** 0.5
    x, v = COSINE.noised(clean, noise, 600), COSINE.velocity(clean, noise, 600)
    torch.testing.assert_close(root * x - rest * v, clean)
    torch.testing.assert_close(rest * x + root * v, noise)


@pytest.mark.parametrize("t", [250, torch.tensor([1, 700])])
def test_noising_equals_the_incumbents_to_the_last_bit(t):
    from diffusers import DDPMScheduler

    clean, noise = torch.randn(2, 2, 3, 8, 8)
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    t_B = t if isinstance(t, torch.Tensor) else torch.tensor([t, t])
    assert torch.equal(COSINE.noised(clean, noise, t), theirs.add_noise(clean, noise, t_B))
    assert torch.equal(COSINE.velocity(clean, noise, t), theirs.get_velocity(clean, noise, t_B))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_noised_in_float32_and_comes_back_as_it_went(dtype):
    clean, noise = torch.randn(2, 1, 3, 4, 4).to(dtype)
    noised = COSINE.noised(clean, noise, 999)
    assert noised.dtype == dtype
    assert torch.equal(noised, COSINE.noised(clean.float(), noise.float(), 999).to(dtype))


def test_use_leaves_the_table_alone():
    before = copy.deepcopy(COSINE.alpha_bar_T)
    COSINE.noised(torch.randn(1, 3, 2, 2).half(), torch.randn(1, 3, 2, 2).half(), 3)
    assert torch.equal(COSINE.alpha_bar_T, before)
    assert COSINE.alpha_bar_T.dtype == torch.float32


def test_the_table_is_the_schedules_own():
    given = torch.tensor([0.9, 0.5])
    schedule = NoiseSchedule(given)
    given.zero_()
    assert torch.equal(schedule.alpha_bar_T, torch.tensor([0.9, 0.5]))


@pytest.mark.parametrize("table", [torch.tensor([0.5, 0.9]), torch.tensor([1.5]), torch.tensor([]), torch.ones(2, 2)])
def test_a_table_that_is_no_schedule_is_refused(table):
    with pytest.raises(ValueError, match="alpha_bar_T"):
        NoiseSchedule(table)


@pytest.mark.parametrize(
    "t", [-1, 1000, torch.tensor([0, 1000]), torch.tensor([-1]), torch.tensor([0.5]), torch.tensor([1, 1, 1])]
)
def test_a_timestep_outside_the_schedule_is_refused(t):
    clean = torch.zeros(2, 3, 2, 2)
    with pytest.raises(ValueError, match="t must be"):
        COSINE.noised(clean, clean, t)


@pytest.mark.parametrize("betas", [[], [0.1, 1.2], [-0.1]])
def test_betas_outside_their_range_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule.of_betas(betas)


def test_a_schedule_without_timesteps_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        NoiseSchedule.cosine(0)
