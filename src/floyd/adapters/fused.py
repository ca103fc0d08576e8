"""LoRA written into the weights, and out of them again to the bit.

Adding a change and taking it away leaves other last bits than there were. So the weights themselves are kept: on a CPU
the tensor that was there, which may be a file's memory map; from an accelerator a copy in main memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from floyd.adapters.attached import active_on, lora_layers
from floyd.adapters.factors import innermost, is_plain

log = logging.getLogger(__name__)

_KEPT = "weight_before_lora"  # an attribute of the layer


def fused_on(network: Any) -> list[str]:
    """The LoRA that is in a network's weights."""
    return list(dict.fromkeys(name for _, layer in lora_layers(network) for name in layer.merged_adapters))


@torch.no_grad()
def fuse(networks: Iterable[Any], names: Sequence[str] | None, *, scale: float, is_safe: bool) -> None:
    """Write these, or those that act, into the weights: all of it, or nothing."""
    work = [
        (path, layer, own)
        for network in networks
        for path, layer in lora_layers(network)
        if (own := _unfused(layer, active_on(network) if names is None else names))
    ]
    for path, layer, _ in work:
        _check_fusible(path, innermost(layer))
    done: list[tuple[Any, Tensor, list[str]]] = []
    try:
        for path, layer, own in work:
            weight = innermost(layer).weight
            changed = weight.data + sum(layer.get_delta_weight(name) * scale for name in own).to(weight.dtype)
            if is_safe and not bool(changed.isfinite().all()):
                raise ValueError(f"With {', '.join(own)} the weights of {path} would not be finite; nothing was fused.")
            done.append((layer, weight.data, list(layer.merged_adapters)))
            if _KEPT not in layer.__dict__:
                layer.__dict__[_KEPT] = weight.data.cpu()
            weight.data = changed
            layer.merged_adapters.extend(own)
    except BaseException:
        for layer, before, merged in done:
            innermost(layer).weight.data = before
            layer.merged_adapters[:] = merged
            if not merged:
                layer.__dict__.pop(_KEPT)
        raise


@torch.no_grad()
def unfuse(network: Any) -> None:
    """Put back the weights that were there before."""
    for path, layer in lora_layers(network):
        if not layer.merged:
            continue
        kept = layer.__dict__.pop(_KEPT, None)
        if kept is None:
            log.warning("%s was fused by peft itself, which takes it out only up to rounding.", path)
            layer.unmerge()
        else:
            weight = innermost(layer).weight
            weight.data = kept.to(weight.device, weight.dtype)
            layer.merged_adapters.clear()


def _unfused(layer: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in layer.lora_A and name not in layer.merged_adapters]


def _check_fusible(path: str, base: nn.Module) -> None:
    if not is_plain(base):
        raise ValueError(
            f"LoRA cannot be fused into {path}, which is quantized: rounding would swallow most of it. Leave it "
            "unfused, or fuse first and quantize then."
        )
    if base.weight.is_meta:
        raise ValueError(f"LoRA cannot be fused into {path}, whose weights accelerate keeps elsewhere.")
