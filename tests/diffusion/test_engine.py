"""B images  C channels  H height  W width"""

import pytest
import torch

from floyd.diffusion.canvas import Canvas
from floyd.diffusion.conditioning import Conditioning
from floyd.diffusion.engine import STOP, Change, denoise, moves
from floyd.diffusion.guidance import Guidance
from floyd.diffusion.limits import DynamicThreshold
from floyd.diffusion.noise import Noise
from floyd.diffusion.samplers import Ancestral, Implicit
from floyd.diffusion.schedule import NoiseSchedule
from floyd.diffusion.timesteps import leading, steps_of

SCHEDULE = NoiseSchedule.cosine()
ANCESTRAL = Ancestral(SCHEDULE, limit=DynamicThreshold(0.95, 1.5))
STEPS = steps_of(leading(6))
PICTURE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., 2:6, 2:6] = 1
BLANK = Canvas.blank(2, 8, 8)


def network(x, t, text):
    """A small function of all that a network sees, with a variance behind it."""
    mixed = torch.tanh(x + text.mean(dim=(1, 2)).view(-1, 1, 1, 1) + t / 1000)
    return torch.cat([mixed, 0.5 * mixed.flip(1)], dim=1)


def texts():
    generator = torch.Generator().manual_seed(9)
    return torch.randn(2, 2, 4, 8, generator=generator).unbind()


def predictor(scale=5.0):
    positive, negative = texts()
    guidance = Guidance.classifier_free(Conditioning(positive), Conditioning(negative), scale)
    return guidance.predictor(lambda x, t, conditioning: network(x, t, conditioning.text_BLD))


def painted(canvas=BLANK, sampler=ANCESTRAL, steps=STEPS, noise=None, on_step=None):
    noise = noise or Noise.seeded(1)
    x = canvas.first(SCHEDULE, steps[0].t, noise)
    return denoise(x, predictor(), sampler, steps, canvas, noise, on_step)


def incumbent(generator, picture=None, mask=None, strength=1.0):
    """The incumbent's loop around the incumbent's scheduler, task by task."""
    from diffusers import DDPMScheduler
    from diffusers.utils.torch_utils import randn_tensor

    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    )
    scheduler.set_timesteps(6)
    timesteps = scheduler.timesteps[6 - int(6 * strength) :]
    positive, negative = texts()
    text = torch.cat([negative, positive])
    x = noise = randn_tensor((2, 3, 8, 8), generator, torch.device("cpu"), torch.float32)
    if picture is not None:
        x = scheduler.add_noise(picture, noise, timesteps[:1].repeat(2))
    if mask is not None:
        x = (1 - mask) * picture + mask * x
    for t in timesteps:
        before = x
        base, pull = network(torch.cat([x, x]), int(t), text).chunk(2)
        out = base[:, :3] + 5.0 * (pull[:, :3] - base[:, :3])
        x = scheduler.step(torch.cat([out, pull[:, 3:]], 1), t, before, generator=generator).prev_sample
        if mask is not None:
            x = (1 - mask) * picture + mask * x
    return x


@pytest.mark.parametrize(
    ("task", "strength"),
    [({}, 1.0), ({"picture": PICTURE}, 0.7), ({"picture": PICTURE, "mask": MASK}, 1.0)],
    ids=["text-to-image", "image-to-image", "inpainting"],
)
@pytest.mark.parametrize("seeds", [(3,), (3, 4)])
def test_every_task_equals_the_incumbents_loop_to_the_last_bit(task, strength, seeds):
    ours = [torch.Generator().manual_seed(s) for s in seeds]
    theirs = [torch.Generator().manual_seed(s) for s in seeds]
    canvas = Canvas(task["picture"], mask_B1HW=task.get("mask")) if task else BLANK
    x = painted(canvas, steps=steps_of(leading(6), strength), noise=Noise(ours))
    assert torch.equal(x, incumbent(theirs, **task, strength=strength))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.get_state(), b.get_state())


def test_kept_pixels_are_the_pictures_to_the_last_bit_at_every_step():
    seen = []

    def look(step, x, clean):
        seen.append(step.t)
        for shown in (x, clean):
            assert torch.equal(shown.where(MASK == 0, 0), PICTURE.where(MASK == 0, 0))

    x = painted(Canvas(PICTURE, mask_B1HW=MASK), on_step=look)
    assert torch.equal(x.where(MASK == 0, 0), PICTURE.where(MASK == 0, 0))
    assert not torch.equal(x, PICTURE)
    assert seen == [s.t for s in STEPS]


def test_the_callback_sees_each_step_and_changes_nothing():
    seen = []
    x = painted(on_step=lambda step, x, clean: seen.append((step, x, clean)))
    assert torch.equal(x, painted())
    assert [step for step, _, _ in seen] == list(STEPS)
    assert torch.equal(seen[-1][1], x)
    torch.testing.assert_close(seen[-1][2], x)
    assert all(clean.abs().max() <= 1 for _, _, clean in seen)


def test_a_chain_can_be_watched_step_by_step_and_gradients_are_left_as_they_were():
    noise = Noise.seeded(1)
    x = BLANK.first(SCHEDULE, STEPS[0].t, noise)
    watched = []
    for moved in moves(x, predictor(), ANCESTRAL, STEPS, BLANK, noise):
        assert torch.is_grad_enabled()
        watched.append(moved)
    assert [moved.step for moved in watched] == list(STEPS)
    assert torch.equal(watched[-1].x_BCHW, painted())


def test_two_chains_watched_in_turns_do_not_disturb_each_other():
    def chain(seed):
        noise = Noise.seeded(seed)
        return moves(BLANK.first(SCHEDULE, STEPS[0].t, noise), predictor(), ANCESTRAL, STEPS, BLANK, noise)

    *_, (first, second) = zip(chain(1), chain(2), strict=True)
    assert torch.equal(first.x_BCHW, painted(noise=Noise.seeded(1)))
    assert torch.equal(second.x_BCHW, painted(noise=Noise.seeded(2)))


def test_a_stopped_chain_returns_the_clean_picture_it_was_heading_for():
    seen = []

    def stop_at_third(step, x, clean):
        seen.append(clean)
        return STOP if step.index == 2 else None

    x = painted(on_step=stop_at_third)
    assert len(seen) == 3
    assert torch.equal(x, seen[-1])


def test_a_chain_goes_on_with_what_the_callback_changed():
    last = STEPS[-1]

    def from_the_start(step, x, clean):
        return Change(x_BCHW=torch.zeros_like(x)) if step is last else None

    assert torch.equal(painted(on_step=from_the_start), torch.zeros_like(PICTURE))

    asked = []

    def another(x, t):
        asked.append(t)
        return predictor(scale=1.0)(x, t)

    changed = painted(on_step=lambda step, x, clean: Change(predict=another) if step.index == 2 else None)
    assert asked == [step.t for step in STEPS[3:]]
    assert not torch.equal(changed, painted())
    assert torch.equal(painted(on_step=lambda step, x, clean: Change()), painted())


def test_what_the_callback_changed_leaves_the_kept_pixels_alone():
    canvas = Canvas(PICTURE, mask_B1HW=MASK)
    x = painted(canvas, on_step=lambda step, x, clean: Change(x_BCHW=torch.ones_like(x)))
    assert torch.equal(x, torch.where(MASK == 0, PICTURE, 1.0))


def test_an_error_of_the_callback_is_the_callers_even_if_it_looks_like_an_end():
    def exhausted(step, x, clean):
        raise StopIteration

    with pytest.raises(StopIteration):
        painted(on_step=exhausted)


@pytest.mark.parametrize("answer", [True, False, 0, "stop"])
def test_an_unclear_answer_of_the_callback_is_refused(answer):
    with pytest.raises(TypeError, match="None to go on or STOP"):
        painted(on_step=lambda step, x, clean: answer)


@pytest.mark.parametrize("sampler", [ANCESTRAL, Implicit(SCHEDULE, eta=1.0, stride=166)], ids=["ancestral", "implicit"])
def test_interleaved_chains_do_not_disturb_each_other(sampler):
    def other(step, x, clean):
        quiet.append(painted(sampler=sampler, steps=steps_of(leading(3)), noise=Noise.seeded(2)))

    quiet = [painted(sampler=sampler, steps=steps_of(leading(3)), noise=Noise.seeded(2))]
    alone = painted(sampler=sampler)
    assert torch.equal(painted(sampler=sampler, on_step=other), alone)
    assert len(quiet) == 7
    assert all(torch.equal(x, quiet[0]) for x in quiet)


def test_an_image_of_its_own_generator_does_not_depend_on_its_neighbours():
    def alone(i):
        positive, negative = (text[i : i + 1] for text in texts())
        guidance = Guidance.classifier_free(Conditioning(positive), Conditioning(negative), 5.0)
        predict = guidance.predictor(lambda x, t, conditioning: network(x, t, conditioning.text_BLD))
        noise, canvas = Noise.seeded(10 + i), Canvas.blank(1, 8, 8)
        return denoise(canvas.first(SCHEDULE, STEPS[0].t, noise), predict, ANCESTRAL, STEPS, canvas, noise)

    together = painted(noise=Noise.seeded([10, 11]))
    torch.testing.assert_close(together, torch.cat([alone(0), alone(1)]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_network_still_paints_a_finite_float32_picture(dtype):
    seen = set()

    def half(x, t, conditioning):
        seen.add(x.dtype)
        return network(x.to(dtype), t, conditioning.text_BLD.to(dtype))

    predict = Guidance(Conditioning(texts()[0])).predictor(half)
    noise, canvas = Noise.seeded(0), Canvas.blank(2, 8, 8, dtype=dtype)
    x = denoise(canvas.first(SCHEDULE, 999, noise), predict, ANCESTRAL, STEPS, canvas, noise)
    assert seen == {x.dtype} == {torch.float32}
    assert x.isfinite().all()


def test_the_loop_keeps_no_gradients():
    weight = torch.ones(1, requires_grad=True)
    predict = Guidance(Conditioning(texts()[0])).predictor(lambda x, t, c: network(x, t, c.text_BLD) * weight)
    noise = Noise.seeded(0)
    assert not denoise(noise(PICTURE), predict, ANCESTRAL, STEPS, BLANK, noise).requires_grad
