"""Tiles cover a picture, fade into each other, and say almost what the whole says."""

from __future__ import annotations

from importlib.resources import files
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from floyd.errors import ConfigError
from floyd.models.tiling import starts, tiled
from floyd.models.vae import AutoencoderKL


@pytest.mark.parametrize(("length", "side"), [(10, 16), (16, 16), (17, 16), (100, 16), (33, 5), (64, 4)])
def test_tiles_cover_everything_and_overlap(length: int, side: int) -> None:
    begins = starts(length, side)
    assert begins[0] == 0
    assert begins[-1] + side >= length
    assert all(0 < later - sooner <= side * 0.75 for sooner, later in pairwise(begins))


@pytest.mark.parametrize("shape", [(1, 2, 40, 56), (3, 2, 16, 41), (1, 2, 9, 9)])
def test_what_looks_at_each_pixel_alone_is_exact_in_tiles(shape: tuple[int, ...], generator: torch.Generator) -> None:
    z = torch.randn(shape, generator=generator)

    def decode(z: Tensor) -> Tensor:
        return F.interpolate(2 * z + 1, scale_factor=4.0, mode="nearest")

    torch.testing.assert_close(tiled(decode, z, side=16, factor=4), decode(z))


def test_a_tile_too_small_to_overlap_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4 latents on a side, got 3"):
        tiled(torch.clone, torch.zeros(1, 1, 8, 8), side=3, factor=1)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(str(files("floyd") / "mini" / "stage_3" / "vae")).requires_grad_(False)


@pytest.fixture(scope="module")
def latents(vae: AutoencoderKL) -> Tensor:
    """A red disc on a white ground that fades to blue."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 384), indexing="ij")
    ground = torch.stack([1 - (x + 1) / 2, 1 - (x + 1) / 2, torch.ones_like(x)])
    inside = (x**2 + y**2 < 0.3).float()
    picture = torch.tensor([1.0, -0.8, -0.8])[:, None, None] * inside + ground * (1 - inside)
    return vae.encode(picture[None].clamp(-1, 1)).latent_dist.mode()


def test_tiles_of_a_real_decoder_drift_little_and_leave_no_edge(vae: AutoencoderKL, latents: Tensor) -> None:
    whole = vae.decode(latents).sample
    try:
        vae.enable_tiling(side=48)
        pieces = vae.decode(latents).sample
    finally:
        vae.disable_tiling()
    difference = pieces - whole
    assert 0 < difference.abs().mean() < 0.05  # of 2, from black to white
    assert difference.abs().amax() < 0.5
    edges = max(float(difference.diff(dim=-1).abs().amax()), float(difference.diff(dim=-2).abs().amax()))
    assert edges < 0.15  # no pixel differs from its neighbour by more than one does within a tile
    assert torch.equal(vae.decode(latents).sample, whole)


def test_one_image_at_a_time_is_the_same(vae: AutoencoderKL, latents: Tensor) -> None:
    both = torch.cat([latents[..., :16, :16], latents[..., -16:, -16:]])
    whole = vae.decode(both).sample
    try:
        vae.enable_slicing()
        torch.testing.assert_close(vae.decode(both).sample, whole, atol=1e-5, rtol=0)
    finally:
        vae.disable_slicing()
