"""Memory for time: activations within a layer are forgotten and computed again on the way back (arXiv:1604.06174)."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from floyd.nn.attention import AddedKVAttention
from floyd.nn.resnet import ResnetBlock
from floyd.nn.transformer import Transformer2D

_LAYERS = (ResnetBlock, AddedKVAttention, Transformer2D)


def recompute(unet: nn.Module) -> int:
    """Let every residual block and attention layer keep only its input; how many there are is returned."""
    layers = [layer for layer in unet.modules() if isinstance(layer, _LAYERS)]
    for layer in layers:
        forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = forward  # type: ignore[method-assign]  # this network's own, for as long as it is trained
    return len(layers)
