"""The published checkpoints, as far as a memory plan needs them: what they hold, and how large it is in float16.

Shapes are computed from the architectures, for those who ask before they download. What is on the disk always wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

from floyd.models.configs import PRESETS
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL
from floyd.store.headers import Stored
from floyd.store.pretrained import parameters_on_meta

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Described:
    """A component as its folder tells of it."""

    class_name: str
    config: Mapping[str, Any]
    tensors: tuple[Stored, ...]


@dataclass(frozen=True)
class DescribedPipeline:
    """The components with weights, by name."""

    class_name: str
    components: Mapping[str, Described] = field(default_factory=dict)


_T5: dict[str, Any] = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab": 32128}
_CLIP: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "vocab": 49408, "max_position_embeddings": 77,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224,
}  # fmt: skip
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip
_UPSCALER = "StableDiffusionUpscalePipeline"
# id -> the pipeline's class, and the row of PRESETS that is its UNet
_PUBLISHED: dict[str, tuple[str, str]] = {
    "DeepFloyd/IF-I-M-v1.0": ("IFPipeline", "IF-I-M"),
    "DeepFloyd/IF-I-L-v1.0": ("IFPipeline", "IF-I-L"),
    "DeepFloyd/IF-I-XL-v1.0": ("IFPipeline", "IF-I-XL"),
    "DeepFloyd/IF-II-M-v1.0": ("IFSuperResolutionPipeline", "IF-II-M"),
    "DeepFloyd/IF-II-L-v1.0": ("IFSuperResolutionPipeline", "IF-II-L"),
    "stabilityai/stable-diffusion-x4-upscaler": (_UPSCALER, "x4-upscaler"),
}
KNOWN_IDS = tuple(_PUBLISHED)


@cache
def known(model_id: str) -> DescribedPipeline | None:
    """A published pipeline by its id on the hub."""
    if model_id not in _PUBLISHED:
        return None
    class_name, preset = _PUBLISHED[model_id]
    unet = _described("UNet2DConditionModel", PRESETS[preset], _shapes_of(UNet2DConditionModel, PRESETS[preset]))
    if class_name == _UPSCALER:
        vae = _described("AutoencoderKL", _VAE, _shapes_of(AutoencoderKL, _VAE))
        text_encoder = _described("CLIPTextModel", _CLIP, dict(_clip_text()))
        return DescribedPipeline(class_name, {"text_encoder": text_encoder, "unet": unet, "vae": vae})
    return DescribedPipeline(
        class_name,
        {
            "text_encoder": _described("T5EncoderModel", _T5, dict(_t5())),
            "unet": unet,
            "safety_checker": _described("IFSafetyChecker", {"vision_config": _VISION}, dict(_checker())),
        },
    )


def _described(class_name: str, config: Mapping[str, Any], shapes: Shapes) -> Described:
    tensors = tuple(Stored(name, shape, prod(shape) * (4 if ".wo." in name else 2)) for name, shape in shapes.items())
    return Described(class_name, config, tensors)


def _shapes_of(cls: Any, config: Mapping[str, Any]) -> Shapes:
    with parameters_on_meta():
        network = cls(**config)
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def _t5() -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = _T5["d_model"], _T5["d_ff"]
    attended = _T5["num_heads"] * _T5["d_kv"]
    yield "shared.weight", (_T5["vocab"], width)
    for i in range(_T5["num_layers"]):
        first, second = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for name in "qkv":
            yield f"{first}.SelfAttention.{name}.weight", (attended, width)
        yield f"{first}.SelfAttention.o.weight", (width, attended)
        if i == 0:
            yield f"{first}.SelfAttention.relative_attention_bias.weight", (32, _T5["num_heads"])
        yield f"{first}.layer_norm.weight", (width,)
        for name in ("wi_0", "wi_1"):
            yield f"{second}.DenseReluDense.{name}.weight", (inner, width)
        yield f"{second}.DenseReluDense.wo.weight", (width, inner)
        yield f"{second}.layer_norm.weight", (width,)
    yield "encoder.final_layer_norm.weight", (width,)


def _clip_text() -> Iterator[tuple[str, tuple[int, ...]]]:
    width = _CLIP["hidden_size"]
    yield "text_model.embeddings.token_embedding.weight", (_CLIP["vocab"], width)
    yield "text_model.embeddings.position_embedding.weight", (_CLIP["max_position_embeddings"], width)
    yield from _tower("text_model.encoder", _CLIP)
    yield from _affine("text_model.final_layer_norm", width)


def _checker() -> Iterator[tuple[str, tuple[int, ...]]]:
    width, patch = _VISION["hidden_size"], _VISION["patch_size"]
    model = "vision_model.vision_model"
    yield f"{model}.embeddings.class_embedding", (width,)
    yield f"{model}.embeddings.patch_embedding.weight", (width, 3, patch, patch)
    yield f"{model}.embeddings.position_embedding.weight", (1 + (_VISION["image_size"] // patch) ** 2, width)
    yield from _affine(f"{model}.pre_layrnorm", width)
    yield from _tower(f"{model}.encoder", _VISION)
    yield from _affine(f"{model}.post_layernorm", width)
    yield "vision_model.visual_projection.weight", (768, width)
    for head in ("p_head", "w_head"):
        yield f"{head}.weight", (1, 768)
        yield f"{head}.bias", (1,)


def _tower(name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    for i in range(config["num_hidden_layers"]):
        layer = f"{name}.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(f"{layer}.self_attn.{part}", width, width)
        yield from _affine(f"{layer}.mlp.fc1", inner, width)
        yield from _affine(f"{layer}.mlp.fc2", width, inner)
        yield from _affine(f"{layer}.layer_norm1", width)
        yield from _affine(f"{layer}.layer_norm2", width)


def _affine(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
