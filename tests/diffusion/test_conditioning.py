import pytest
import torch
import torch.nn.functional as F

from floyd.diffusion.canvas import Canvas
from floyd.diffusion.conditioning import Conditioning, low_res_condition
from floyd.diffusion.noise import Noise
from floyd.diffusion.schedule import NoiseSchedule

TEXT = torch.linspace(-1, 1, 80).view(2, 5, 8)
LOW_RES = torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)
LEVEL = torch.tensor([4, 4])


def test_joined_branches_lie_in_order():
    first, second = Conditioning(TEXT, LOW_RES, LEVEL), Conditioning(-TEXT, -LOW_RES, LEVEL + 1)
    joined = first.joined([second])
    assert torch.equal(joined.text_BLD, torch.cat([TEXT, -TEXT]))
    assert torch.equal(joined.low_res_BCHW, torch.cat([LOW_RES, -LOW_RES]))
    assert torch.equal(joined.noise_level_B, torch.tensor([4, 4, 5, 5]))


def test_what_no_branch_has_stays_absent():
    joined = Conditioning(TEXT).joined([Conditioning(TEXT)])
    assert joined.low_res_BCHW is None
    assert joined.noise_level_B is None


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (Conditioning(TEXT), "low_res_BCHW"),
        (Conditioning(TEXT, LOW_RES), "noise_level_B"),
        (Conditioning(TEXT[:, :3], LOW_RES, LEVEL), "text_BLD"),
        (Conditioning(TEXT, LOW_RES[..., :8], LEVEL), "low_res_BCHW"),
    ],
)
def test_branches_that_disagree_are_refused_by_name(other, name):
    with pytest.raises(ValueError, match=f"must agree: {name}"):
        Conditioning(TEXT, LOW_RES, LEVEL).joined([other])


def test_parts_of_different_batches_are_refused():
    with pytest.raises(ValueError, match="noise_level_B has 1 entries for 2 prompts"):
        Conditioning(TEXT, LOW_RES, LEVEL[:1])


def test_the_low_resolution_picture_lies_behind_x():
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(Conditioning(TEXT, LOW_RES).takes(x), torch.cat([x, LOW_RES], 1))
    assert Conditioning(TEXT).takes(x) is x


def test_the_picture_to_enlarge_is_enlarged_corner_to_corner_and_noised_once():
    schedule, image = NoiseSchedule.cosine(), torch.rand(2, 3, 4, 4)
    noised, level = low_res_condition(image, (8, 12), 250, schedule, Noise.seeded(0))
    enlarged = F.interpolate(image, (8, 12), mode="bilinear", align_corners=True)
    assert torch.equal(noised, schedule.noised(enlarged, Noise.seeded(0)(enlarged), 250))
    assert torch.equal(enlarged[..., 0, 0], image[..., 0, 0])
    assert level.tolist() == [250, 250]
    assert level.dtype == torch.int64


@pytest.mark.parametrize("level", [-1, 1000])
def test_a_noise_level_outside_the_schedule_is_refused(level):
    with pytest.raises(ValueError, match=r"noise_level must be in \[0, 1000\)"):
        low_res_condition(torch.rand(1, 3, 4, 4), (8, 8), level, NoiseSchedule.cosine(), Noise())


def test_a_picture_is_enlarged_to_what_is_handed_out_and_continued_to_the_margin():
    schedule, image = NoiseSchedule.cosine(), torch.rand(1, 3, 4, 6) * 2 - 1
    canvas = Canvas.blank(1, 7, 11).widened(8)
    noised, _ = low_res_condition(image, canvas.sides, 250, schedule, Noise.seeded(0), extended=canvas.extended)
    enlarged = F.interpolate(image, (7, 11), mode="bilinear", align_corners=True)
    whole = F.pad(enlarged, (0, 5, 0, 1), mode="replicate")
    assert torch.equal(noised, schedule.noised(whole, Noise.seeded(0)(whole), 250))


def test_apart_each_image_has_its_own():
    first, second = Conditioning(TEXT, LOW_RES, LEVEL + torch.tensor([0, 1])).apart()
    for i, one in enumerate((first, second)):
        assert torch.equal(one.text_BLD, TEXT[i : i + 1])
        assert torch.equal(one.low_res_BCHW, LOW_RES[i : i + 1])
        assert one.noise_level_B.tolist() == [4 + i]
    assert [one.low_res_BCHW for one in Conditioning(TEXT).apart()] == [None, None]
