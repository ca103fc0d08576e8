from __future__ import annotations

import pytest

from floyd.adapters.keys import Key, layer_of, looks_like, read_key

P = "down_blocks.1.attentions.0"
T = "encoder.block.3.layer.0.SelfAttention"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (f"unet.{P}.to_q.lora_A.weight", Key("unet", f"{P}.to_q", "down")),
        (f"unet.{P}.to_out.0.lora_B.weight", Key("unet", f"{P}.to_out.0", "up")),
        (f"unet.{P}.to_q.lora_A.kangaroo.weight", Key("unet", f"{P}.to_q", "down")),
        (f"unet.{P}.add_k_proj.lora.down.weight", Key("unet", f"{P}.add_k_proj", "down")),
        (f"unet.{P}.processor.to_out_lora.up.weight", Key("unet", f"{P}.to_out", "up")),
        (f"unet.{P}.processor.add_v_proj_lora.down.weight", Key("unet", f"{P}.add_v_proj", "down")),
        (f"text_encoder.{T}.q.lora_linear_layer.up.weight", Key("text_encoder", f"{T}.q", "up")),
        ("lora_unet_conv_in.lora_down.weight", Key("unet", "conv_in", "down", is_flat=True)),
        ("lora_unet_mid_block_attentions_0_to_q.alpha", Key("unet", "mid_block_attentions_0_to_q", "alpha", True)),
        ("lora_te_encoder_block_0.lora_up.weight", Key("text_encoder", "encoder_block_0", "up", is_flat=True)),
        (f"{P}.to_k.lora_A.weight", Key(None, f"{P}.to_k", "down")),
        (f"base_model.model.{P}.to_k.lora_B.weight", Key(None, f"{P}.to_k", "up")),
        (f"unet._orig_mod.base_model.model.{P}.to_k.lora_B.weight", Key("unet", f"{P}.to_k", "up")),
        (f"module.unet.{P}.to_k.lora_B.weight", Key("unet", f"{P}.to_k", "up")),
    ],
)
def test_a_key_says_component_layer_and_role(name: str, key: Key) -> None:
    assert read_key(name) == key


@pytest.mark.parametrize(
    "name",
    [
        f"unet.{P}.to_q.weight",
        f"unet.{P}.to_q.lora_A.bias",
        f"unet.{P}.to_q.lora_magnitude_vector",
        "lora_unet_conv_in.dora_scale",
        "lora_unet_conv_in.hada_w1_a",
        "lora_unet_conv_in.lora_mid.weight",
        "lora_A.weight",
        "",
    ],
)
def test_what_is_no_factor_of_lora_is_no_key(name: str) -> None:
    assert read_key(name) is None


LAYERS = {f"{P}.to_q", f"{P}.to_out.0", f"{P}.add_k_proj", f"{T}.q", f"{T}.o", "encoder.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (f"unet.{P}.to_q.lora_A.weight", f"{P}.to_q"),
        (f"unet.{P}.processor.to_out_lora.up.weight", f"{P}.to_out.0"),
        (f"lora_unet_{P.replace('.', '_')}_to_out_0.lora_up.weight", f"{P}.to_out.0"),
        (f"lora_unet_{P.replace('.', '_')}_add_k_proj.alpha", f"{P}.add_k_proj"),
        (f"text_encoder.{T}.to_q_lora.up.weight", f"{T}.q"),
        (f"text_encoder.{T}.to_out_lora.up.weight", f"{T}.o"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
            "encoder.layers.0.self_attn.q_proj",
        ),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha", "encoder.layers.0.self_attn.q_proj"),
        (f"unet.{P}.to_k.lora_A.weight", None),
        ("lora_unet_to_q.alpha", None),
    ],
)
def test_the_layer_is_found_under_the_name_it_has_here(name: str, layer: str | None) -> None:
    key = read_key(name)
    assert key is not None
    assert layer_of(key, LAYERS) == layer


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("unet.conv_in.lora_magnitude_vector", "DoRA"),
        ("lora_unet_conv_in.lokr_w1", "another kind than LoRA"),
        ("lora_unet_input_blocks_1_0_proj.lora_down.weight", "original code"),
        ("lora_te2_text_model_x.lora_down.weight", "second text encoder"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "diffusion transformer"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "Stable Diffusion"),
        (f"unet.{P}.to_q.lora_B.bias", "LoRA with a bias"),
        (f"unet.{P}.to_q.weight", "a weight of a whole network"),
        (f"unet.{P}.to_quux.lora_A.weight", f"the nearest layer here is {P}.to_q"),
        ("lora_unet_down_blocks_1_attentions_0_to_quux.alpha", f"the nearest layer here is {P}.to_q"),
    ],
)
def test_what_cannot_be_used_is_guessed_at(name: str, meaning: str) -> None:
    assert meaning in looks_like(name, [f"{P}.to_q", "mid_block.attentions.0.to_out.0"])


def test_of_what_resembles_nothing_nothing_is_said() -> None:
    assert looks_like("banana") == ""
