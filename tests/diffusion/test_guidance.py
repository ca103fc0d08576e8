import pytest
import torch

from floyd.diffusion.conditioning import Conditioning
from floyd.diffusion.guidance import Guidance, split

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
EMPTY, TEXT, STYLE = (Conditioning(torch.full((2, 1, 1), value)) for value in (0.0, 1.0, 5.0))


def network(x, t, conditioning):
    """Noise that depends on text and time; a variance that names its branch."""
    text = conditioning.text_BLD.view(-1, 1, 1, 1)
    return torch.cat([x * (1 + text) + t, torch.zeros_like(x) + text], dim=1)


def test_guidance_is_the_base_and_a_weighted_pull():
    predict = Guidance.classifier_free(TEXT, EMPTY, 7.0).predictor(network)
    torch.testing.assert_close(predict(X, 10).target_BCHW, (X + 10) + 7 * ((2 * X + 10) - (X + 10)))


def test_the_variance_is_the_conditional_branchs():
    assert (Guidance.classifier_free(TEXT, EMPTY, 7.0).predictor(network)(X, 10).variance_BCHW == 1).all()


def test_style_mixing_is_two_pulls():
    predict = Guidance(EMPTY, ((TEXT, 4.0 * 0.75), (STYLE, 4.0 * 0.25))).predictor(network)
    noise_of = {text: X * (1 + text) + 3 for text in (0, 1, 5)}
    expected = noise_of[0] + 4 * (0.75 * noise_of[1] + 0.25 * noise_of[5] - noise_of[0])
    torch.testing.assert_close(predict(X, 3).target_BCHW, expected)
    assert (predict(X, 3).variance_BCHW == 1).all()


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_scale_of_at_most_one_runs_one_branch_and_needs_no_negative_prompt(scale):
    guidance = Guidance.classifier_free(TEXT, None, scale)
    assert guidance.num_branches == 1
    assert torch.equal(guidance.predictor(network)(X, 0).target_BCHW, 2 * X)


def test_all_branches_share_one_forward_pass_the_base_first():
    calls = []

    def spy(x, t, conditioning):
        calls.append((x.shape, conditioning.text_BLD.flatten().tolist()))
        return network(x, t, conditioning)

    Guidance(EMPTY, ((TEXT, 1.0), (STYLE, 1.0))).predictor(spy)(X, 0)
    assert calls == [((6, 3, 4, 4), [0, 0, 1, 1, 5, 5])]


def counted(guidance, timesteps):
    """`over`, with a network that counts the rows it is given; and what was made ready for which timesteps."""
    rows, asked = [], []

    def spy(x, t, conditioning):
        rows.append((t, len(x)))
        return network(x, t, conditioning)

    def predict_for(part, own):
        asked.append((part.num_branches, list(own)))
        return part.predictor(spy)

    return guidance.over(timesteps, predict_for), rows, asked


def test_outside_of_its_times_guidance_is_none_and_one_branch_runs():
    guided, alone = (Guidance.classifier_free(TEXT, EMPTY, scale).predictor(network) for scale in (7.0, 1.0))
    predict, rows, asked = counted(Guidance.classifier_free(TEXT, EMPTY, 7.0, range(3, 6)), [9, 6, 5, 3, 2])
    for t, wanted in ((9, alone), (6, alone), (5, guided), (3, guided), (2, alone)):
        for part, expected in zip(predict(X, t), wanted(X, t), strict=True):
            assert torch.equal(part, expected)
    assert rows == [(9, 2), (6, 2), (5, 4), (3, 4), (2, 2)]
    assert asked == [(2, [5, 3]), (1, [9, 6, 2])]


def test_outside_of_its_times_the_variance_is_still_the_conditional_branchs():
    mixed = Guidance(EMPTY, ((TEXT, 3.0), (STYLE, 1.0)), range(3, 6))
    predict, *_ = counted(mixed, [9, 5])
    assert all((predict(X, t).variance_BCHW == 1).all() for t in (9, 5))


@pytest.mark.parametrize(("times", "scale"), [(range(1000), 7.0), (None, 7.0), (range(3, 6), 1.0)])
def test_a_part_that_has_no_steps_is_not_made_ready(times, scale):
    _, _, asked = counted(Guidance.classifier_free(TEXT, EMPTY, scale, times), [9, 5])
    assert asked == [(2 if scale > 1 else 1, [9, 5])]


def test_the_guidance_of_each_image_alone_has_the_same_times():
    assert [g.times for g in Guidance(EMPTY, ((TEXT, 3.0),), range(3, 6)).apart()] == [range(3, 6)] * 2


def test_guidance_without_a_negative_prompt_is_refused():
    with pytest.raises(ValueError, match="negative prompt"):
        Guidance.classifier_free(TEXT, None, 7.0)


def test_a_network_without_variance_predicts_none():
    assert Guidance(TEXT).predictor(lambda x, t, c: x)(X, 0).variance_BCHW is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_branches_are_combined_in_float32_whatever_the_network_computes_in(dtype):
    def half(x, t, conditioning):
        return network(x, t, conditioning).to(dtype)

    pred = Guidance.classifier_free(TEXT, EMPTY, 7.0).predictor(half)(X, 10)
    base, pull = ((X * (1 + text) + 10).to(dtype).float() for text in (0, 1))
    assert torch.equal(pred.target_BCHW, base + 7.0 * (pull - base))
    assert pred.variance_BCHW.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (2, 9, 4, 4), (1, 3, 4, 4), (2, 3, 4, 8), (2, 3)])
def test_an_output_that_is_neither_target_nor_target_and_variance_is_refused(shape):
    with pytest.raises(ValueError, match="must return 3 channels, or 6"):
        split(torch.zeros(shape), X.shape)


def test_apart_the_network_sees_one_image_of_one_branch_at_a_time():
    texts = [Conditioning(torch.tensor([[[value]], [[value + 0.5]]])) for value in (0.0, 1.0, 5.0)]
    guidance = Guidance(texts[0], ((texts[1], 3.0), (texts[2], 1.0)))
    seen, told = [], []

    def network_for(conditioning):
        told.append(conditioning.text_BLD.item())

        def watched(x, t, other):
            seen.append((len(x), other.text_BLD.item()))
            return network(x, t, other)

        return watched

    together, apart = guidance.predictor(network)(X, 10), guidance.predictor_apart(network_for)(X, 10)
    for part, wanted in zip(apart, together, strict=True):
        torch.testing.assert_close(part, wanted)
    assert told == [0.0, 1.0, 5.0, 0.5, 1.5, 5.5]
    assert seen == [(1, text) for text in told]


def test_apart_a_network_without_variance_has_none():
    predict = Guidance.classifier_free(TEXT, None, 1.0).predictor_apart(lambda _: lambda x, t, told: x)
    assert predict(X, 0).variance_BCHW is None
    assert torch.equal(predict(X, 0).target_BCHW, X)
