"""The decoder of the engine "winograd" against the VAE whose place it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.engines.networks import autoencoder
from torch import Tensor

from floyd.engines.decoder import prepared
from floyd.engines.registry import decoder_for
from floyd.errors import EngineError
from floyd.models.vae import AutoencoderKL

pytestmark = pytest.mark.usefixtures("compiled")

EXACT = 1e-4


def latents(batch: int = 2, height: int = 7, wide: int = 10) -> Tensor:
    return torch.randn(batch, 4, height, wide, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(vae: AutoencoderKL, z_BZhw: Tensor) -> float:
    expected = vae.decode(z_BZhw).sample
    assert expected.std() > 0.05, "a flat picture proves nothing"
    return float((vae.decode(z_BZhw, by=prepared(vae)).sample - expected).abs().max())


@pytest.mark.parametrize("widths", [(16,), (16, 32), (24, 40, 48), (16, 256)])
@pytest.mark.parametrize("attends", [True, False])
def test_pixels_are_the_decoders_own(widths: tuple[int, ...], attends: bool) -> None:
    assert difference(autoencoder(*widths, attends=attends), latents()) < EXACT


@pytest.mark.parametrize("act", ["gelu", "relu", "mish", "swish"])
def test_every_activation_is_known(act: str) -> None:
    assert difference(autoencoder(16, 32, act=act), latents()) < EXACT


def test_tiles_and_slices_are_decoded_as_they_come() -> None:
    vae = autoencoder(16, 32)
    vae.enable_slicing()
    vae.enable_tiling(side=8)
    assert difference(vae, latents(height=12, wide=20)) < EXACT


@torch.no_grad()
def test_weights_that_change_are_followed() -> None:
    vae, z_BZhw = autoencoder(16, 32), latents()
    decoder = prepared(vae)
    before = decoder(z_BZhw)
    vae.decoder.conv_in.weight.mul_(2)
    vae.decoder.up_blocks[0].resnets[0] = copy.deepcopy(vae.decoder.up_blocks[0].resnets[0])
    after = decoder(z_BZhw)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, vae.decode(z_BZhw).sample, atol=EXACT, rtol=0)


def test_what_is_not_plain_is_refused_and_openvino_has_no_decoder() -> None:
    with pytest.raises(EngineError, match="bfloat16"):
        prepared(autoencoder(16).bfloat16())
    with pytest.raises(EngineError, match="AutoencoderKL"):
        prepared(torch.nn.Identity())
    with pytest.raises(ValueError, match="float32"):
        prepared(autoencoder(16))(latents().double())
    assert decoder_for("openvino", autoencoder(16)) is None
