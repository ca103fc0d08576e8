"""LoRA to be trained (arXiv:2106.09685), and its file: PEFT's keys, which diffusers reads, too."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from floyd.store.files import made
from floyd.store.weights import write_file

NAME = "default"
FILE_NAME = "pytorch_lora_weights.safetensors"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
_METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for peft's configuration, keys prefixed by component


def attach(unet: nn.Module, *, rank: int, alpha: float, targets: Sequence[str] = TARGETS, seed: int = 0) -> Any:
    """Freeze the network and lay fresh LoRA over its layers, changing nothing yet: `up` is zero.

    Returns peft's configuration. LoRA is float32 whatever the network is.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    peft = _peft()
    unet.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peft.inject_adapter_in_model(config, unet, adapter_name=NAME)
        except ValueError as error:
            raise ValueError(f"targets {', '.join(targets)} name no layer of this network: {error}") from error
    generator = torch.Generator().manual_seed(seed)
    for _, layer in _layers(unet):
        down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        down.data = (torch.randn(down.shape, generator=generator) / rank).to(down.device)
        up.data = torch.zeros_like(up, dtype=torch.float32)
        for factor in (down, up):
            factor.requires_grad_(True)
    return config


def save(unet: nn.Module, config: Any, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """The trained factors as `pytorch_lora_weights.safetensors`, alpha in the metadata."""
    state = {}
    for path, layer in _layers(unet):
        for part in ("lora_A", "lora_B"):
            state[f"unet.{path}.{part}.weight"] = getattr(layer, part)[NAME].weight.detach().to("cpu", dtype)
    told = {f"unet.{key}": value for key, value in config.to_dict().items()}
    text = json.dumps(
        told, indent=2, sort_keys=True, default=lambda each: sorted(each) if isinstance(each, set) else str(each)
    )
    path = made(folder) / FILE_NAME
    write_file(state, path, metadata={_METADATA_KEY: text})
    return path


def _layers(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """Those that have LoRA, by name."""
    for path, layer in unet.named_modules():
        if hasattr(layer, "lora_A"):
            yield path, layer


def _peft() -> Any:
    try:
        return import_module("peft")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError("LoRA needs peft, which is not installed: pip install 'floyd-if[train]'") from error
