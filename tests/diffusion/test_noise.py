import pytest
import torch

from floyd.diffusion.noise import Noise

LIKE = torch.zeros(3, 2, 4, 4)


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.mark.parametrize("seeds", [(0,), (4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_draws_and_generator_states_equal_the_incumbents(seeds, dtype):
    from diffusers.utils.torch_utils import randn_tensor

    ours, theirs = generators(*seeds), generators(*seeds)
    for _ in range(2):
        drawn = Noise(ours)(LIKE.to(dtype))
        assert drawn.dtype == dtype
        assert torch.equal(drawn, randn_tensor(LIKE.shape, theirs, torch.device("cpu"), dtype))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.get_state(), b.get_state())


def test_an_image_of_its_own_generator_does_not_depend_on_its_neighbours():
    batch = Noise(generators(1, 2, 3))(LIKE)
    assert torch.equal(batch[1:2], Noise(generators(2)[0])(LIKE[:1]))


def test_a_list_of_one_is_that_generator():
    assert torch.equal(Noise(generators(7))(LIKE), Noise(generators(7)[0])(LIKE))


def test_without_a_generator_torchs_own_is_used():
    torch.manual_seed(3)
    expected = torch.randn(LIKE.shape)
    torch.manual_seed(3)
    assert torch.equal(Noise()(LIKE), expected)


def test_seeds_are_generators_on_the_cpu():
    assert torch.equal(Noise.seeded(5)(LIKE), Noise(generators(5)[0])(LIKE))
    assert torch.equal(Noise.seeded([5, 6, 7])(LIKE), Noise(generators(5, 6, 7))(LIKE))


@pytest.mark.parametrize("seeds", [(1, 2), (1, 2, 3, 4)])
def test_generators_that_do_not_fit_the_batch_are_refused(seeds):
    with pytest.raises(ValueError, match=f"{len(seeds)} generators for 3 images"):
        Noise(generators(*seeds))(LIKE)


@pytest.mark.parametrize("wrong", [5, "seed", [], [1, 2], [None]])
def test_what_is_no_generator_is_refused(wrong):
    with pytest.raises(TypeError, match="generator must be"):
        Noise(wrong)


def test_a_generator_elsewhere_cannot_draw_for_the_cpu(monkeypatch):
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="A generator on cuda cannot draw for a tensor on cpu"):
        Noise(Elsewhere())(LIKE)


@pytest.mark.gpu
def test_a_seed_on_the_cpu_gives_the_same_noise_on_the_gpu():
    assert torch.equal(Noise.seeded(1)(LIKE.cuda()).cpu(), Noise.seeded(1)(LIKE))
    with pytest.raises(ValueError, match="cannot draw"):
        Noise(torch.Generator("cuda"))(LIKE)


@pytest.mark.parametrize("seed", [4, [4, 5, 6]], ids=["one generator", "a generator for each"])
def test_apart_images_draw_what_they_draw_together(seed):
    together, parts = Noise.seeded(seed), Noise.seeded(seed).apart(3)
    first, second = together(LIKE), together(LIKE)
    alone = LIKE[:1]
    assert torch.equal(torch.cat([parts[i](alone) for i in (2, 0, 1)]), first[[2, 0, 1]])
    assert torch.equal(torch.cat([part(alone) for part in parts]), second)


def test_apart_there_is_a_generator_for_each_image():
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        Noise(generators(1, 2)).apart(3)
    assert torch.equal(Noise.seeded([7]).apart(1)[0](LIKE[:1]), Noise.seeded(7)(LIKE[:1]))
