import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


SIDES = st.integers(1, 19)


@settings(max_examples=40, deadline=None)
@given(height=SIDES, width=SIDES, multiple=st.sampled_from([1, 2, 8]), masked=st.booleans())
def test_a_widened_canvas_hands_out_what_it_was_made_of(height, width, multiple, masked):
    picture = torch.rand(2, 3, height, width)
    mask = (torch.rand(1, 1, height, width) > 0.5).float() if masked else None
    canvas = Canvas(picture, mask_B1HW=mask).widened(multiple)
    rows, columns = canvas.picture_BCHW.shape[2:]
    assert rows % multiple == columns % multiple == 0
    assert rows - height < multiple
    assert columns - width < multiple
    assert canvas.sides == (height, width)
    assert torch.equal(canvas.cropped(canvas.picture_BCHW), picture)
    assert torch.equal(canvas.picture_BCHW, canvas.extended(picture))
    x = torch.randn(2, 3, rows, columns)
    expected = Canvas(picture, mask_B1HW=mask).keep(x[..., :height, :width])
    assert torch.equal(canvas.finished(canvas.keep(x)), expected)


@pytest.mark.parametrize("canvas", [Canvas.blank(1, 8, 16), Canvas(PICTURE, mask_B1HW=MASK)])
def test_a_canvas_that_fits_is_left_as_it_is(canvas):
    assert canvas.widened(8) is canvas
    x = torch.randn(canvas.picture_BCHW.shape)
    assert canvas.cropped(x) is canvas.extended(x) is canvas.finished(x) is x


def test_the_margin_continues_the_edge():
    canvas = Canvas(PICTURE[..., :5, :6], mask_B1HW=MASK[..., :5, :6], soft_B1HW=MASK[..., :5, :6] / 2).widened(8)
    for whole, part in ((canvas.picture_BCHW, PICTURE), (canvas.mask_B1HW, MASK), (canvas.soft_B1HW, MASK / 2)):
        assert whole.shape[2:] == (8, 8)
        assert torch.equal(whole[..., 5:, :6], part[..., 4:5, :6].expand(-1, -1, 3, -1))
        assert torch.equal(whole[..., :, 6:], whole[..., :, 5:6].expand(-1, -1, -1, 2))


def test_a_blank_canvas_draws_noise_for_its_margin_too():
    canvas = Canvas.blank(2, 7, 7).widened(8)
    assert canvas.is_blank
    assert torch.equal(canvas.first(SCHEDULE, 999, Noise.seeded(0)), Noise.seeded(0)(PICTURE))


def test_a_part_can_be_changed_and_the_margin_stays():
    canvas, x = Canvas.blank(1, 5, 6).widened(8), torch.randn(1, 3, 8, 8)
    changed = canvas.with_cropped(x, torch.zeros(1, 3, 5, 6))
    assert torch.equal(changed[..., :5, :6], torch.zeros(1, 3, 5, 6))
    assert torch.equal(changed[..., 5:, :], x[..., 5:, :])
    assert x[..., :5, :6].any(), "the given one is left alone"


def test_a_soft_mask_counts_in_the_end_alone():
    canvas = Canvas(PICTURE, mask_B1HW=MASK, soft_B1HW=MASK / 4)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(canvas.keep(x), Canvas(PICTURE, mask_B1HW=MASK).keep(x))
    finished = canvas.finished(canvas.keep(x))
    assert torch.equal(finished[..., 4:], PICTURE[..., 4:])
    torch.testing.assert_close(finished[..., :4], 0.75 * PICTURE[..., :4] + 0.25 * x[..., :4])


def test_a_soft_mask_that_repaints_what_is_kept_is_refused():
    with pytest.raises(ValueError, match="soft mask must not repaint"):
        Canvas(PICTURE, mask_B1HW=MASK, soft_B1HW=torch.full((1, 1, 8, 8), 0.1))
    with pytest.raises(ValueError, match="soft mask must not repaint"):
        Canvas(PICTURE, soft_B1HW=MASK)


@pytest.mark.parametrize("size", [(0, 8), (8, 9)])
def test_a_size_beyond_the_canvas_is_refused(size):
    with pytest.raises(ValueError, match="size must lie within"):
        Canvas(PICTURE, size=size)
