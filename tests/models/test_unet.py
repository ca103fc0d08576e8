"""The UNet against diffusers 0.42.1: the same keys at real size, the same numbers at tiny size."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel as Incumbent
from torch import Tensor

from floyd.errors import ConfigError
from floyd.models.configs import PRESETS
from floyd.models.unet import UNet2DConditionModel

# name -> (parameters, tensors in the state dict), from the sizes of the published files where those are known
PUBLISHED = {
    "IF-I-M": (371_605_830, 775),
    "IF-I-L": (935_365_830, 775),
    "IF-I-XL": (4_304_695_110, 775),
    "IF-II-M": (482_483_334, 939),
    "IF-II-L": (1_243_277_190, 939),
    "x4-upscaler": (473_398_020, 687),
}

# Each switches on every feature of the real ones, and differs from level to level wherever a level can be mistaken.
STAGE_ONE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 2,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 48,
    "encoder_hid_dim_type": "text_proj",
    "resnet_time_scale_shift": "scale_shift",
}
STAGE_TWO: dict[str, Any] = {
    **STAGE_ONE,
    "in_channels": 6,
    "layers_per_block": (1, 2, 3),
    "class_embed_type": "timestep",
    "time_embedding_dim": 96,
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
}
X4: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 7,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,  # the number of heads, whatever the name says
    "cross_attention_dim": 40,
    "only_cross_attention": (True, True, False),
    "num_class_embeds": 50,
    "use_linear_projection": True,
}
TINY = {"stage I": STAGE_ONE, "stage II": STAGE_TWO, "x4": X4}

VARIANTS: dict[str, dict[str, Any]] = {
    "only cross-attention": {**STAGE_TWO, "only_cross_attention": True},
    "only cross-attention, not in the middle": {
        **STAGE_ONE,
        "only_cross_attention": True,
        "mid_block_only_cross_attention": False,
    },
    "only cross-attention, by level": {**STAGE_ONE, "only_cross_attention": (False, False, True)},
    "head widths by level": {**STAGE_ONE, "attention_head_dim": (8, 16, 32)},
    "head counts by level": {**X4, "attention_head_dim": (2, 4, 8)},
    "layers by level": {**STAGE_ONE, "layers_per_block": (3, 1, 2)},
    "layers by level, x4": {**X4, "layers_per_block": (1, 3, 2)},
    "text at its own width": {
        **STAGE_ONE,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "cross_attention_norm": None,
    },
    "text projection without its type": {**STAGE_ONE, "encoder_hid_dim_type": None},
    "sinusoid, sine first and shifted": {**STAGE_ONE, "flip_sin_to_cos": False, "freq_shift": 1},
    "centred input": {**STAGE_ONE, "center_input_sample": True},
    "groups, epsilon, kernels": {
        **STAGE_ONE,
        "norm_num_groups": 16,
        "norm_eps": 1e-3,
        "conv_in_kernel": 1,
        "conv_out_kernel": 5,
    },
    "middle scale, x4": {**X4, "mid_block_scale_factor": 2.0},
    "convolutions around the transformer": {**X4, "use_linear_projection": False, "only_cross_attention": False},
    "time scales and shifts, x4": {**X4, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": None},
}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Fresh norms are the identity and hide errors: move every parameter away from its initial value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter))
    return model.eval()


def pair(config: dict[str, Any]) -> tuple[UNet2DConditionModel, Incumbent]:
    """Both networks with the same, fully randomized weights."""
    torch.manual_seed(0)
    incumbent = randomized(Incumbent(**config))
    ours = UNet2DConditionModel(**config).eval()
    ours.load_state_dict(incumbent.state_dict(), strict=True)
    return ours, incumbent


def inputs(config: dict[str, Any], batch: int = 2, size: tuple[int, int] = (16, 16), tokens: int = 5) -> dict[str, Any]:
    torch.manual_seed(2)
    text_width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    given: dict[str, Any] = {
        "sample": torch.randn(batch, config["in_channels"], *size),
        "encoder_hidden_states": torch.randn(batch, tokens, text_width),
    }
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        given["class_labels"] = torch.arange(7, 7 + 5 * batch, 5)
    return given


def assert_same(ours: UNet2DConditionModel, incumbent: Incumbent, timestep: Any = 321, **given: Any) -> None:
    with torch.no_grad():
        expected = incumbent(timestep=timestep, **given).sample
        got = ours(timestep=timestep, **given).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# --- real size, without memory


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_has_the_incumbents_keys_shapes_and_counts(name: str) -> None:
    with torch.device("meta"):
        ours = UNet2DConditionModel(**PRESETS[name])
        incumbent = Incumbent(**PRESETS[name])
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in incumbent.state_dict().items()}
    assert (sum(p.numel() for p in ours.parameters()), len(shapes)) == PUBLISHED[name]


# --- tiny size, the same numbers


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    "timestep", [321, 0, 500.5, torch.tensor(999), torch.tensor([3]), torch.tensor([980, 17])], ids=str
)
def test_a_prediction_equals_the_incumbents(name: str, timestep: float | Tensor) -> None:
    assert_same(*pair(TINY[name]), timestep, **inputs(TINY[name]))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_prediction_of_another_configuration_equals_the_incumbents(name: str) -> None:
    assert_same(*pair(VARIANTS[name]), **inputs(VARIANTS[name]))


@pytest.mark.parametrize(("name", "size"), [("stage I", (24, 8)), ("stage II", (8, 20)), ("x4", (18, 13))])
def test_a_picture_need_not_be_square(name: str, size: tuple[int, int]) -> None:
    assert_same(*pair(TINY[name]), **inputs(TINY[name], batch=1, size=size))


@pytest.mark.parametrize("name", ["stage I", "stage II"])
def test_masked_tokens_are_left_out_as_the_incumbent_does(name: str) -> None:
    mask_BL = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    ours, incumbent = pair(TINY[name])
    assert_same(ours, incumbent, **inputs(TINY[name]), encoder_attention_mask=mask_BL)


@pytest.mark.parametrize("name", TINY)
def test_every_gradient_equals_the_incumbents(name: str) -> None:
    ours, incumbent = pair(TINY[name])
    for model in (ours, incumbent):
        model(timestep=321, **inputs(TINY[name])).sample.square().mean().backward()
    expected = dict(incumbent.named_parameters())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, f"{key} takes no part"
        torch.testing.assert_close(parameter.grad, expected[key].grad, atol=1e-4, rtol=1e-3)


# --- laws


@pytest.mark.parametrize("name", TINY)
def test_reading_once_and_stepping_equals_calling(name: str) -> None:
    unet = pair(TINY[name])[0]
    given = inputs(TINY[name])
    sample = given.pop("sample")
    with torch.no_grad():
        context = unet.read(given["encoder_hidden_states"], given.get("class_labels"))
        for t in (999, torch.tensor(500), torch.tensor([3, 700])):
            assert torch.equal(unet.step(sample, t, context), unet(sample, t, **given).sample)


@pytest.mark.parametrize("name", TINY)
def test_a_batch_predicts_what_its_members_do(name: str) -> None:
    unet, given = pair(TINY[name])[0], inputs(TINY[name], batch=3)
    t_B = torch.tensor([900, 40, 500])
    with torch.no_grad():
        together = unet(timestep=t_B, **given).sample
        alone = [unet(timestep=t_B[i], **{k: v[i : i + 1] for k, v in given.items()}).sample for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", ["sample", "encoder_hidden_states", "class_labels", "timestep"])
def test_everything_it_is_told_changes_the_prediction(key: str) -> None:
    unet, given = pair(STAGE_TWO)[0], {**inputs(STAGE_TWO), "timestep": torch.tensor([500, 500])}
    with torch.no_grad():
        before = unet(**given).sample
        given[key] = given[key] + (100 if given[key].dtype == torch.int64 else 0.5 * torch.randn_like(given[key]))
        assert (unet(**given).sample - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_half_precision_stays_half_and_near(name: str) -> None:
    unet, given = pair(TINY[name])[0], inputs(TINY[name])
    with torch.no_grad():
        exact = unet(timestep=321, **given).sample
        halved = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
        half = unet.bfloat16()(timestep=321, **halved).sample
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).pow(2).mean() < 1e-3 * exact.pow(2).mean()


def test_without_return_dict_the_sample_comes_in_a_tuple() -> None:
    unet, given = pair(STAGE_ONE)[0], inputs(STAGE_ONE)
    with torch.no_grad():
        (sample,) = unet(timestep=5, **given, return_dict=False)
        assert torch.equal(sample, unet(timestep=5, **given).sample)


# --- configuration


def test_a_configuration_keeps_keys_that_are_not_ours() -> None:
    unet = UNet2DConditionModel.from_config({**STAGE_ONE, "a_foreign_key": [1, 2], "_diffusers_version": "0.15.0"})
    assert unet.config.a_foreign_key == [1, 2]
    assert unet.config.to_json()["_diffusers_version"] == "0.15.0"
    assert unet.config.in_channels == unet.config["in_channels"] == 3


def test_a_file_that_leaves_keys_out_means_the_incumbents_defaults() -> None:
    ours = UNet2DConditionModel.config_class.from_json({})
    theirs = dict(inspect.signature(Incumbent).parameters)
    assert {key: ours[key] for key in ours.known_keys()} == {key: theirs[key].default for key in ours.known_keys()}


def test_a_misspelt_keyword_is_named() -> None:
    with pytest.raises(TypeError, match="atention_head_dim"):
        UNet2DConditionModel(**STAGE_ONE, atention_head_dim=8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "tanh"),
        ("addition_embed_type", "text_image"),
        ("addition_time_embed_dim", 256),
        ("addition_embed_type_num_heads", 5),
        ("addition_embed_type_num_heads", 0),
        ("attention_head_dim", (8, 8)),
        ("attention_head_dim", 4096),  # more than a level has channels: no head would be left
        ("attention_head_dim", 0),
        ("attention_type", "gated"),
        ("class_embed_type", "projection"),
        ("class_embeddings_concat", True),
        ("cross_attention_norm", "layer_norm"),
        ("down_block_types", ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")),
        ("downsample_padding", 0),
        ("dual_cross_attention", True),
        ("encoder_hid_dim", None),
        ("encoder_hid_dim_type", "image_proj"),
        ("layers_per_block", (1, 1, 1, 1)),
        ("mid_block_type", "UNetMidBlock2D"),
        ("num_attention_heads", 4),
        ("only_cross_attention", (True,)),
        ("resnet_time_scale_shift", "ada_group"),
        ("time_cond_proj_dim", 16),
        ("time_embedding_act_fn", "tanh"),
        ("time_embedding_type", "fourier"),
        ("timestep_post_act", "silu"),
        ("transformer_layers_per_block", 2),
        ("up_block_types", ("UpBlock2D",)),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        UNet2DConditionModel.from_config({**STAGE_ONE, key: value})


def test_a_noise_level_that_is_missing_or_not_wanted_is_refused() -> None:
    stage_one, stage_two = UNet2DConditionModel(**STAGE_ONE), UNet2DConditionModel(**STAGE_TWO)
    given = inputs(STAGE_TWO)
    with pytest.raises(ValueError, match="class_labels"):
        stage_two(given["sample"], 5, given["encoder_hidden_states"])
    with pytest.raises(ValueError, match="class_labels"):
        stage_one(given["sample"][:, :3], 5, given["encoder_hidden_states"], given["class_labels"])


@pytest.mark.parametrize("size", [(16, 18), (13, 16)])
def test_a_size_that_the_levels_cannot_halve_is_refused(size: tuple[int, int]) -> None:
    assert UNet2DConditionModel.config_class(**PRESETS["IF-II-L"]).side_multiple == 16
    with pytest.raises(ValueError, match=f"multiples of 4 .* got {size[0]} by {size[1]}"):
        UNet2DConditionModel(**STAGE_ONE)(timestep=5, **inputs(STAGE_ONE, size=size))


# --- files


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_what_the_incumbent_saves_is_loaded(name: str, safe_serialization: bool, tmp_path: Path) -> None:
    incumbent = pair(TINY[name])[1]
    incumbent.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    assert_same(UNet2DConditionModel.from_pretrained(tmp_path).eval(), incumbent, **inputs(TINY[name]))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_what_is_saved_the_incumbent_loads(name: str, safe_serialization: bool, tmp_path: Path) -> None:
    ours = pair(TINY[name])[0]
    ours.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    incumbent = Incumbent.from_pretrained(tmp_path, use_safetensors=safe_serialization, low_cpu_mem_usage=False)
    assert_same(ours, incumbent.eval(), **inputs(TINY[name]))
