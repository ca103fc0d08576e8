import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from floyd.diffusion.limits import Clip, DynamicThreshold, quantile


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 17),
    length=st.integers(1, 700),
    ratio=st.sampled_from([0.0, 0.123, 0.5, 0.9, 0.95, 0.995, 1.0]) | st.floats(0, 1),
    seed=st.integers(0, 2**31),
    ties=st.booleans(),
)
def test_the_quantile_equals_torchs_to_the_last_bit(batch, length, ratio, seed, ties):
    x = torch.randn(batch, length, generator=torch.Generator().manual_seed(seed))
    x = (x * 2).round() if ties else x
    assert torch.equal(quantile(x, ratio), torch.quantile(x, ratio, dim=1, keepdim=True))


@pytest.mark.parametrize("side", [64, 256])
def test_the_quantile_equals_torchs_at_the_sizes_of_the_stages(side):
    x = torch.randn(2, 3 * side * side).abs()
    for ratio in (0.95, 0.995):
        assert torch.equal(quantile(x, ratio), torch.quantile(x, ratio, dim=1, keepdim=True))


def test_the_quantile_of_infinities_is_a_number():
    assert quantile(torch.full((1, 8), torch.inf), 0.95).isfinite().all()
    assert quantile(torch.tensor([[0.0, torch.inf]]), 0.5).isfinite().all()


@pytest.mark.parametrize(("ratio", "maximum"), [(0.95, 1.5), (0.95, 1.0), (0.995, 3.0), (0.5, 100.0)])
def test_the_dynamic_threshold_equals_the_incumbents_to_the_last_bit(ratio, maximum):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=maximum)
    ours = DynamicThreshold(ratio, maximum)
    for scale in (0.1, 1.0, 5.0):
        clean = torch.randn(3, 3, 16, 16) * scale
        assert torch.equal(ours(clean), theirs._threshold_sample(clean))


def test_a_dynamic_threshold_brings_each_image_into_range_by_itself():
    clean = torch.stack([torch.linspace(-0.5, 0.5, 48), torch.linspace(-4, 4, 48)]).view(2, 3, 4, 4)
    limited = DynamicThreshold(0.9, 10.0)(clean)
    assert torch.equal(limited[0], clean[0])
    assert limited[1].abs().max() == 1
    assert 0 < limited[1, 1, 2, 0] < clean[1, 1, 2, 0] < 1


@pytest.mark.parametrize("limit", [DynamicThreshold(0.95, 1.5), DynamicThreshold(0.95, 1.0), Clip()])
def test_infinite_pixels_become_saturated_ones(limit):
    clean = torch.randn(1, 3, 4, 4)
    clean[0, 0] = torch.inf
    clean[0, 1] = -torch.inf
    limited = limit(clean)
    assert limited.isfinite().all()
    assert (limited[0, 0] == 1).all()
    assert (limited[0, 1] == -1).all()


def test_a_clip_cuts_at_its_range():
    assert Clip(2.0)(torch.tensor([-5.0, 1.5, 5.0])).tolist() == [-2.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Clip, (0,)),
        (Clip, (-1,)),
        (DynamicThreshold, (1.5,)),
        (DynamicThreshold, (-0.1,)),
        (DynamicThreshold, (0.9, 0)),
    ],
)
def test_limits_that_limit_nothing_are_refused(kind, arguments):
    with pytest.raises(ValueError, match="must be"):
        kind(*arguments)
