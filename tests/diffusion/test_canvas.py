import pytest
import torch

from floyd.diffusion.canvas import Canvas
from floyd.diffusion.noise import Noise
from floyd.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.cosine()
PICTURE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., :4] = 1


def test_a_blank_canvas_starts_as_pure_noise():
    assert torch.equal(Canvas.blank(2, 8, 8).first(SCHEDULE, 999, Noise.seeded(0)), Noise.seeded(0)(PICTURE))


def test_a_picture_starts_noised_to_the_level_of_the_first_step():
    expected = SCHEDULE.noised(PICTURE, Noise.seeded(0)(PICTURE), 300)
    assert torch.equal(Canvas(PICTURE).first(SCHEDULE, 300, Noise.seeded(0)), expected)


def test_a_masked_picture_is_noised_only_where_it_is_repainted():
    start = Canvas(PICTURE, mask_B1HW=MASK).first(SCHEDULE, 300, Noise.seeded(0))
    assert torch.equal(start[..., 4:], PICTURE[..., 4:])
    assert torch.equal(start[..., :4], Canvas(PICTURE).first(SCHEDULE, 300, Noise.seeded(0))[..., :4])


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -1e30, 0.3])
def test_kept_pixels_never_change_whatever_was_painted_over_them(rubbish):
    kept = Canvas(PICTURE, mask_B1HW=MASK).keep(torch.full_like(PICTURE, rubbish))
    assert torch.equal(kept[..., 4:], PICTURE[..., 4:])
    torch.testing.assert_close(kept[..., :4], torch.full((2, 3, 8, 4), rubbish), equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_one_mask_may_serve_all_images_and_channels(shape):
    mask = MASK.expand(*shape, 8, 8)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(Canvas(PICTURE, mask_B1HW=mask).keep(x), (1 - MASK) * PICTURE + MASK * x)


def test_a_soft_mask_blends():
    x = torch.randn(2, 3, 8, 8)
    blended = Canvas(PICTURE, mask_B1HW=torch.full((1, 1, 8, 8), 0.25)).keep(x)
    torch.testing.assert_close(blended, 0.75 * PICTURE + 0.25 * x)


def test_a_canvas_without_a_mask_keeps_nothing():
    x = torch.randn(2, 3, 8, 8)
    assert Canvas(PICTURE).keep(x) is x


def test_a_mask_of_truth_values_will_do():
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(Canvas(PICTURE, mask_B1HW=MASK.bool()).keep(x), Canvas(PICTURE, mask_B1HW=MASK).keep(x))


def test_a_blank_canvas_may_have_other_channels_and_another_type():
    canvas = Canvas.blank(1, 4, 6, 4, dtype=torch.bfloat16)
    assert canvas.picture_BCHW.shape == (1, 4, 4, 6)
    assert canvas.first(SCHEDULE, 9, Noise.seeded(0)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(8, 8), (3, 1, 8, 8), (1, 2, 8, 8), (1, 1, 4, 8)])
def test_a_mask_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="mask must be"):
        Canvas(PICTURE, mask_B1HW=torch.zeros(shape))


@pytest.mark.parametrize("value", [-0.1, 255.0, float("nan")])
def test_a_mask_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Canvas(PICTURE, mask_B1HW=torch.full((1, 1, 8, 8), value))


def test_a_mask_without_a_picture_is_refused():
    with pytest.raises(ValueError, match="blank"):
        Canvas(PICTURE, is_blank=True, mask_B1HW=MASK)


@pytest.mark.parametrize("picture", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_what_is_no_batch_of_pictures_is_refused(picture):
    with pytest.raises(ValueError, match="batch of floating point pictures"):
        Canvas(picture)
