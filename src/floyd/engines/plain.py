"""Engines read a network's weights themselves: what sits on its layers, they would miss."""

from __future__ import annotations

from torch import nn

from floyd.errors import EngineError

_LEAVES = (nn.Conv2d, nn.Linear, nn.Embedding, nn.GroupNorm, nn.LayerNorm, nn.Dropout, nn.Identity)
_ACTS = (nn.SiLU, nn.GELU, nn.Mish, nn.ReLU)


def check_plain(unet: nn.Module) -> None:
    """Every layer computes what its class says, with its own weights, and nobody watches."""
    for name, module in unet.named_modules():
        is_ours = type(module).__module__.startswith("floyd.") and "adapters" not in type(module).__module__
        if not is_ours and type(module) not in (*_LEAVES, *_ACTS, nn.ModuleList):
            raise EngineError(
                f"Layer {name or 'unet'} is a {type(module).__module__}.{type(module).__name__}, which engines do not "
                "know. LoRA has to be fused or unloaded first, and quantized networks run without an engine."
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise EngineError(f"Layer {name or 'unet'} has forward hooks, which an engine would not call: remove them.")
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise EngineError("An engine only samples; this network is in training, with dropout: call unet.eval().")
