"""Checkpoints of any size with made-up weights, laid out as the hub has them: half precision, in shards, written one
shard at a time.

The weights are slices of one drawn pool, each scaled by its fan-in, so that a network of billions of weights takes
seconds to draw and its signals stay of ordinary size. T5's feed-forward outputs are float32, as in the published files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import floyd
from floyd.models.configs import PRESETS
from floyd.models.unet import UNet2DConditionModel
from floyd.models.vae import AutoencoderKL
from floyd.store import naming, weights
from floyd.store.files import write_json
from floyd.store.pretrained import parameters_on_meta

VARIANT = "fp16"
MINI = Path(floyd.__file__).parent / "mini"
T5_XXL: dict[str, Any] = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64,
                          "vocab_size": 32128}  # fmt: skip
CLIP: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                        "num_attention_heads": 16, "vocab_size": 49408, "hidden_act": "gelu",
                        "bos_token_id": 708, "eos_token_id": 709, "pad_token_id": 709}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 2, "latent_channels": 4, "scaling_factor": 0.08333,
    "norm_num_groups": 32, "sample_size": 256,
}  # fmt: skip
_POOL = 2**24  # numbers that all weights are slices of


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pipeline to write: which of the built-in ones it is like, and the configurations of its networks."""

    like: str
    unet: Mapping[str, Any]
    text_encoder: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] | None = None


def t5(**smaller: Any) -> dict[str, Any]:
    return {**T5_XXL, **smaller}


def narrow(preset: str, **smaller: Any) -> dict[str, Any]:
    """A published UNet with some of its keys changed."""
    return {**PRESETS[preset], **smaller}


def cascade(first: str, second: str, text_encoder: Mapping[str, Any] | None = None) -> dict[str, Stage]:
    """DeepFloyd's cascade, by the names of its UNets."""
    return {
        first: Stage(like="stage_1", unet=PRESETS[first], text_encoder=text_encoder or T5_XXL),
        second: Stage(like="stage_2", unet=PRESETS[second]),
        "x4": Stage(like="stage_3", unet=PRESETS["x4-upscaler"], text_encoder=CLIP, vae=VAE),
    }


@dataclass
class Pool:
    """Where made-up weights come from."""

    seed: int = 0
    at: int = 0
    numbers: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = torch.randn(_POOL, generator=torch.Generator().manual_seed(self.seed))

    def draw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if len(shape) < 2:
            return torch.full(shape, float(name.endswith("weight")), dtype=dtype)
        fan_in = prod(shape[1:])
        damped = 0.25 if name.startswith("conv_out") else 1.0
        scale = 1.0 if "embed" in name or name.startswith("shared") else damped * fan_in**-0.5
        out, count, filled = torch.empty(prod(shape), dtype=dtype), prod(shape), 0
        while filled < count:
            part = self.numbers[self.at : self.at + count - filled] * scale
            out[filled : filled + len(part)] = part
            filled += len(part)
            self.at = (self.at + len(part)) % _POOL
        return out.view(shape)


def write_stage(stage: Stage, folder: Path, pool: Pool, *, shard_bytes: int = 10**9) -> Path:
    """The whole pipeline; what is not a network is the built-in one's."""
    shutil.copytree(MINI / stage.like, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    own: dict[str, tuple[type[Any], Mapping[str, Any] | None]] = {
        "unet": (UNet2DConditionModel, stage.unet), "vae": (AutoencoderKL, stage.vae),
        "text_encoder": (_text_encoder, stage.text_encoder),
    }  # fmt: skip
    for name, (build, config) in own.items():
        if config is None:
            shutil.rmtree(folder / name, ignore_errors=True)
            continue
        with parameters_on_meta():
            network = build(**config)
        _write_config(network, folder / name)
        base = "model" if name == "text_encoder" else naming.BASES[0]
        write_weights(network, folder / name, base, pool, shard_bytes=shard_bytes)
    return folder


def _text_encoder(**config: Any) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    if "d_model" not in config:
        return CLIPTextModel(CLIPTextConfig(**config))
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", dropout_rate=0.0, **config))


def _write_config(network: Any, folder: Path) -> None:
    if hasattr(network.config, "save_pretrained"):
        network.config.architectures = [type(network).__name__]
        network.config.save_pretrained(folder)
        return
    own = {"_class_name": type(network).__name__, "_diffusers_version": "0.42.1"}
    write_json(folder / "config.json", {**network.config.to_json(), **own})


def write_weights(network: nn.Module, folder: Path, base: str, pool: Pool, *, shard_bytes: int) -> None:
    """Named and cut as the hub's own files are; never more than a shard in memory."""
    rows = {name: (tuple(p.shape), torch.float32 if ".wo." in name else torch.float16)
            for name, p in network.named_parameters()}  # fmt: skip
    shards = list(_shards({name: prod(shape) * dtype.itemsize for name, (shape, dtype) in rows.items()}, shard_bytes))
    total = len(shards) if len(shards) > 1 else 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = naming.weights_name(base, naming.SAFE, variant=VARIANT, number=number if total else 0, total=total)
        weights.write_file({name: pool.draw(name, *rows[name]) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if total:
        size = sum(prod(shape) * dtype.itemsize for shape, dtype in rows.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / naming.index_name(base, naming.SAFE, variant=VARIANT), index)


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, own in sizes.items():
        if names and size + own > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
