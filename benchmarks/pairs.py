"""The same UNet twice, diffusers' and ours, with the same weights; at any size, and what to feed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import floyd
from floyd.models.configs import PRESETS
from floyd.models.unet import UNet2DConditionModel

BUILT_IN = {f"mini-{i}": Path(floyd.__file__).parent / "mini" / f"stage_{i}" for i in (1, 2, 3)}
RANDOM = {name.lower(): name for name in PRESETS}
SIZES = ("mini", *BUILT_IN, *RANDOM)
TOKENS = 77


def folder(size: str) -> Path | None:
    """The built-in checkpoint of that size, if it is one; "mini" is its stage I."""
    return BUILT_IN.get("mini-1" if size == "mini" else size)


def ours(size: str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    if built_in := folder(size):
        return UNet2DConditionModel.from_pretrained(built_in / "unet", torch_dtype=dtype).eval()
    torch.manual_seed(0)
    return UNet2DConditionModel(**PRESETS[RANDOM[size]]).eval().to(dtype)


def pair(size: str, dtype: torch.dtype = torch.float32) -> tuple[Any, UNet2DConditionModel]:
    """diffusers' and ours; the weights are in memory once."""
    from diffusers import UNet2DConditionModel as Incumbent

    network = ours(size, dtype)
    with torch.device("meta"):
        incumbent = Incumbent.from_config(network.config.to_json())
    incumbent.load_state_dict(network.state_dict(), assign=True)
    return incumbent.eval(), network


def texts(size: str, network: Any) -> tuple[Tensor, Tensor]:
    """A prompt and the empty one, as the network reads them: real ones where its text encoder is built in."""
    if size not in ("mini", "mini-1"):
        positive, negative = inputs(network)["encoder_hidden_states"].split(1)
        return positive, negative
    stage = floyd.IFPipeline.from_pretrained(BUILT_IN["mini-1"])
    positive, negative = stage.encode_prompt("a large red circle above a small blue square on a white background")
    return positive, negative


def inputs(network: Any, batch: int = 2) -> dict[str, Tensor]:
    """Made-up arguments of one guided forward pass, at the network's own size."""
    config, generator = network.config, torch.Generator().manual_seed(1)
    width = config.encoder_hid_dim or config.cross_attention_dim
    side, dtype = config.sample_size, network.dtype
    given = {
        "sample": torch.randn(batch, config.in_channels, side, side, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, TOKENS, width, generator=generator).to(dtype),
    }
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        given["class_labels"] = torch.full((batch,), 20)
    return given
