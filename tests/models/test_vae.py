from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from floyd.diffusion.noise import Noise
from floyd.errors import ConfigError
from floyd.models.vae import AutoencoderKL, DiagonalGaussian

X4_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "sample_size": 256,
    "scaling_factor": 0.08333,
}
TINY: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 2,
}
VARIANTS = {
    "as published": {},
    "without attention": {"mid_block_add_attention": False},
    "without quantization": {"use_quant_conv": False, "use_post_quant_conv": False},
    "another activation, more layers": {"act_fn": "gelu", "layers_per_block": 2},
}


def pair(**changes: Any) -> tuple[Any, AutoencoderKL]:
    """The incumbent's autoencoder and ours, with the same random weights."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(**{**TINY, **changes})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    ours = AutoencoderKL(**{**TINY, **changes})
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_encoding_and_decoding_equal_the_incumbent(changes: dict[str, Any]) -> None:
    theirs, ours = pair(**changes)
    x_BCHW, z_BZhw = torch.randn(2, 3, 16, 24), torch.randn(2, 2, 8, 12)
    expected, got = theirs.encode(x_BCHW).latent_dist, ours.encode(x_BCHW).latent_dist
    torch.testing.assert_close(got.mean, expected.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.logvar, expected.logvar, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.kl(), expected.kl(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.decode(z_BZhw).sample, theirs.decode(z_BZhw).sample, atol=1e-5, rtol=1e-5)


def test_gradients_equal_the_incumbent() -> None:
    x_BCHW = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs, ours = pair()
    for vae in (theirs, ours):
        vae.decode(vae.encode(x_BCHW).latent_dist.mode()).sample.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5 * largest, rtol=1e-4)


@torch.no_grad()
def test_a_draw_equals_the_incumbents_for_the_same_seed() -> None:
    theirs, ours = pair()
    x_BCHW = torch.randn(1, 3, 8, 8)
    expected = theirs.encode(x_BCHW).latent_dist.sample(torch.Generator().manual_seed(3))
    got = ours.encode(x_BCHW).latent_dist.sample(Noise.seeded(3))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_x4_autoencoder_has_the_published_parameters() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(**X4_VAE), diffusers.AutoencoderKL(**X4_VAE)
    shapes = {key: weight.shape for key, weight in ours.state_dict().items()}
    assert shapes == {key: weight.shape for key, weight in theirs.state_dict().items()}
    assert len(shapes) == 204
    assert sum(shape.numel() for shape in shapes.values()) == 55_325_927


def test_old_names_of_the_attention_are_renamed() -> None:
    ours = AutoencoderKL(**TINY)
    new = ours.state_dict()
    pairs = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old: dict[str, Tensor] = {}
    for key, weight in new.items():
        for modern, legacy in pairs.items():
            key = key.replace(modern, legacy)
        old[key] = weight
    assert old.keys() != new.keys()
    renamed = AutoencoderKL.rename_keys(old)
    assert list(renamed) == list(new)
    assert all(renamed[key] is old_weight for key, old_weight in zip(new, old.values(), strict=True))


@torch.no_grad()
def test_folders_travel_between_the_incumbent_and_us(tmp_path: Path) -> None:
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    z_BZhw = torch.randn(1, 2, 4, 4)
    assert torch.equal(again.decode(z_BZhw).sample, theirs.decode(z_BZhw).sample)
    torch.testing.assert_close(ours.decode(z_BZhw).sample, again.decode(z_BZhw).sample, atol=1e-5, rtol=1e-5)


def test_names_of_today_are_left_alone() -> None:
    state_dict = AutoencoderKL(**TINY).state_dict()
    assert list(AutoencoderKL.rename_keys(state_dict)) == list(state_dict)


@torch.no_grad()
def test_a_plain_tuple_is_given_on_request() -> None:
    vae = AutoencoderKL(**TINY)
    (distribution,) = vae.encode(torch.zeros(1, 3, 8, 8), return_dict=False)
    (picture_BCHW,) = vae.decode(distribution.mode(), return_dict=False)
    assert picture_BCHW.shape == (1, 3, 8, 8)
    assert torch.equal(vae(torch.zeros(1, 3, 8, 8)).sample, picture_BCHW)


def test_the_journey_through_a_draw_can_be_trained() -> None:
    vae = AutoencoderKL(**TINY)
    picture = vae(torch.rand(1, 3, 8, 8), noise=Noise.seeded(0))
    picture.sample.square().mean().backward()
    without = [name for name, parameter in vae.named_parameters() if parameter.grad is None]
    assert without == []


def test_the_divergence_of_a_standard_normal_is_zero() -> None:
    assert torch.equal(DiagonalGaussian(torch.zeros(2, 4, 3, 3)).kl(), torch.zeros(2))
    assert (DiagonalGaussian(torch.ones(2, 4, 3, 3)).kl() > 0).all()


def test_a_huge_log_variance_is_limited() -> None:
    distribution = DiagonalGaussian(torch.full((1, 2, 1, 1), 1e4))
    assert distribution.logvar.item() == 20.0
    assert torch.isfinite(distribution.std).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 9, 8)])
def test_a_picture_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"got \("):
        AutoencoderKL(**TINY).encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "changes",
    [
        {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")},
        {"up_block_types": ("UpDecoderBlock2D",)},
        {"act_fn": "tanh"},
        {"norm_num_groups": 3},
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(changes: dict[str, Any]) -> None:
    (key,) = changes
    with pytest.raises(ConfigError, match=key):
        AutoencoderKL(**{**TINY, **changes})


def test_foreign_keys_survive() -> None:
    vae = AutoencoderKL.from_config({**TINY, "_class_name": "AutoencoderKL", "something": 1})
    assert vae.config.to_json()["something"] == 1
    assert vae.config["block_out_channels"] == (8, 16)
    assert vae.compression == 2
