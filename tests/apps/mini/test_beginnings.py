"""What the autoencoder does before it has learned anything."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from floyd.apps.mini.stage_three import build_vae
from floyd.models.vae import AutoencoderKL


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return build_vae().eval()


@torch.no_grad()
def test_latents_begin_as_the_means_of_the_pixels_below_them(vae: AutoencoderKL) -> None:
    picture_BCHW = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent_BZhw = vae.encode(picture_BCHW, return_dict=False)[0].mean
    means_BChw = F.avg_pool2d(picture_BCHW, 4)
    torch.testing.assert_close(latent_BZhw[:, :3], means_BChw, rtol=0, atol=0.02)
    assert latent_BZhw[:, 3].std() > 0.01  # room for what the means do not tell


@torch.no_grad()
@pytest.mark.parametrize("color", [(0.6, -0.3, 0.1), (-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)], ids=str)
def test_a_flat_colour_comes_back(vae: AutoencoderKL, color: tuple[float, float, float]) -> None:
    picture_BCHW = torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    there = vae.encode(picture_BCHW, return_dict=False)[0].mean
    back_BCHW = vae.decode(there, return_dict=False)[0]
    inside_BCHW = back_BCHW[..., 8:-8, 8:-8]  # the border sees the padding
    torch.testing.assert_close(inside_BCHW, picture_BCHW[..., 8:-8, 8:-8], rtol=0, atol=0.03)


@torch.no_grad()
def test_a_colour_does_not_depend_on_the_rest_of_the_picture(vae: AutoencoderKL) -> None:
    dark_BCHW = torch.full((1, 3, 64, 64), -1.0)
    half_BCHW = dark_BCHW.clone()
    half_BCHW[..., 32:] = 1.0
    dark_Zhw, half_Zhw = (vae.encode(x_BCHW, return_dict=False)[0].mean[0, :3] for x_BCHW in (dark_BCHW, half_BCHW))
    torch.testing.assert_close(half_Zhw[..., :6], dark_Zhw[..., :6], rtol=0, atol=0.02)


def test_training_leaves_the_anchors_and_moves_the_rest() -> None:
    vae = build_vae()
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    picture_BCHW = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    optimizer = torch.optim.SGD(vae.parameters(), lr=0.1)
    latent = vae.encode(picture_BCHW, return_dict=False)[0].mean
    (vae.decode(latent, return_dict=False)[0] - picture_BCHW).square().mean().backward()
    optimizer.step()
    after = dict(vae.named_parameters())
    anchored, free = "decoder.mid_block.resnets.0.conv1", "decoder.mid_block.resnets.0.conv2"
    assert after[f"{anchored}.bias"][6] == before[f"{anchored}.bias"][6] > 1
    assert torch.equal(after[f"{anchored}.weight"][:, 6], torch.zeros_like(after[f"{anchored}.weight"][:, 6]))
    assert not torch.equal(after[f"{free}.weight"], before[f"{free}.weight"])
