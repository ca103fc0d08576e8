"""What every engine asks of a network and of what it is given, and the small part that the network still computes.

Engines read a network's weights themselves: what sits on its layers, they would miss.

B images  C channels  H height  W width  L text tokens  E encoder width  T time width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from floyd.engines.weights import check_tensor
from floyd.errors import EngineError
from floyd.models.unet import UNet2DConditionModel
from floyd.nn.embedding import sinusoid

_LEAVES = (nn.Conv2d, nn.Linear, nn.Embedding, nn.GroupNorm, nn.LayerNorm, nn.Dropout, nn.Identity)
_ACTS = (nn.SiLU, nn.GELU, nn.Mish, nn.ReLU)


def check_network(unet: nn.Module) -> None:
    """Every layer computes what its class says, with its own weights, in float32 on the CPU, and nobody watches."""
    for name, module in unet.named_modules():
        is_ours = type(module).__module__.startswith(("floyd.models.", "floyd.nn."))  # not adapters, nor fewer bits
        if not is_ours and type(module) not in (*_LEAVES, *_ACTS, nn.ModuleList):
            raise EngineError(
                f"Layer {name or 'unet'} is a {type(module).__module__}.{type(module).__name__}, which engines do not "
                "know. LoRA has to be fused and then unloaded first, and quantized networks run without an engine."
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise EngineError(f"Layer {name or 'unet'} has forward hooks, which an engine would not call: remove them.")
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise EngineError("An engine only samples; this network is in training, with dropout: call unet.eval().")
    for parameter in unet.parameters():
        check_tensor(parameter)


def check_inputs(unet: UNet2DConditionModel, sample: Tensor, batch: int) -> Tensor:
    """The picture as the first layer takes it."""
    multiple, (own_batch, channels, height, width) = unet.config.side_multiple, sample.shape
    if sample.device.type != "cpu" or sample.dtype != torch.float32:
        raise ValueError(f"Engines compute in float32 on the CPU; sample is {sample.dtype} on {sample.device}.")
    if channels != unet.config.in_channels or own_batch != batch:
        raise ValueError(
            f"sample must be [{batch}, {unet.config.in_channels}, H, W] for this UNet and the text it was told, "
            f"got {list(sample.shape)}."
        )
    if height % multiple or width % multiple:
        raise ValueError(
            f"The sides of sample must be multiples of {multiple} for this UNet, got {height} by {width}: "
            "pad or resize the picture."
        )
    x_BCHW = 2 * sample - 1.0 if unet.config.center_input_sample else sample
    return x_BCHW.contiguous()


def read_label_and_pooled(unet: UNet2DConditionModel, text_BLE: Tensor, class_labels: Tensor | None) -> Tensor | None:
    """[B, T], what prompt and noise level add to the embedding of time."""
    parts = [part for part in (unet._label(class_labels, text_BLE), unet._pooled(text_BLE)) if part is not None]
    return sum(parts[1:], parts[0]) if parts else None


def embedded(unet: UNet2DConditionModel, timestep: Tensor | float, batch: int, other_BT: Tensor | None) -> Tensor:
    """[B, T] of a time, and of what else goes the same way."""
    config = unet.config
    t_B = torch.as_tensor(timestep).reshape(-1).expand(batch)
    features = sinusoid(
        t_B, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
    )
    emb_BT = unet.time_embedding(features)
    if other_BT is not None:
        emb_BT = emb_BT + other_BT
    return emb_BT if unet.time_embed_act is None else unet.time_embed_act(emb_BT)
