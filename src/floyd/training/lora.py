"""LoRA to be trained (arXiv:2106.09685), and its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from floyd.adapters.attached import activate, enable, layers_on, lora_layers
from floyd.adapters.attached import attach as put_on
from floyd.adapters.factors import Factors, Shape, layer_shapes
from floyd.adapters.files import SAFE_NAME, write

NAME = "default"
FILE_NAME = SAFE_NAME
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


def attach(unet: nn.Module, *, rank: int, alpha: float, targets: Sequence[str] = TARGETS, seed: int = 0) -> None:
    """Freeze the network and lay fresh LoRA over the layers whose names end so, changing nothing yet: `up` is zero.

    LoRA is float32 whatever the network is.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    shapes = {path: shape for path, shape in layer_shapes(unet) if f".{path}".endswith(tuple(f".{t}" for t in targets))}
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in shapes):
            raise ValueError(f"targets must be ends of names of this network's layers; none ends in {target!r}.")
    unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    put_on(unet, NAME, {path: _fresh(shape, rank, alpha, generator) for path, shape in shapes.items()})
    activate(unet, [NAME])
    for _, layer in lora_layers(unet):
        for part in (layer.lora_A[NAME], layer.lora_B[NAME]):
            part.weight = nn.Parameter(part.weight.detach().float(), requires_grad=True)


@contextmanager
def without(unet: nn.Module) -> Iterator[nn.Module]:
    """The network as it was before LoRA, whatever it is wrapped in for several processes."""
    inner: nn.Module = getattr(unet, "module", unet)
    enable(inner, False)
    try:
        yield inner
    finally:
        enable(inner, True)


def save(unet: nn.Module, folder: Path) -> Path:
    """What was learned, as floyd, peft and diffusers read it: PEFT's keys, alpha in the weights."""
    path = folder / FILE_NAME
    write({"unet": layers_on(unet, NAME)}, path, {})
    return path


def _fresh(shape: Shape, rank: int, alpha: float, generator: torch.Generator) -> Factors:
    ones = (1, 1) if shape.kernel else ()
    down = torch.randn(rank, shape.inputs, *shape.kernel, generator=generator) / rank
    return Factors(down, torch.zeros(shape.outputs, rank, *ones), alpha)
