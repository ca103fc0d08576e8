"""What a profile is told of a pipeline's networks: when they work, and how much there was to compute.

B images  K all branches' images  C channels  H height  W width  L text tokens  Z latent channels  h, w of the latent
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from floyd.diffusion.conditioning import Conditioning
from floyd.diffusion.guidance import Network, Predict
from floyd.diffusion.samplers import Prediction
from floyd.models.configs import UNetConfig
from floyd.models.costs import decoder_cost, encoder_cost, unet_cost
from floyd.models.tiling import starts
from floyd.models.vae import AutoencoderKL
from floyd.pipelines.options import dtype_of
from floyd.runtime.clock import is_watched, part, tick, work
from floyd.runtime.rates import Arithmetic

if TYPE_CHECKING:
    from floyd.pipelines.base import DiffusionPipeline


def part_of(
    pipeline: DiffusionPipeline, name: str, *, stage: str | None = None, count: int = 0
) -> AbstractContextManager[None]:
    """A part of what a pipeline does. Its stage is the cascade's that calls it, `stage`, or has its class' name."""
    if not is_watched():
        return nullcontext()
    devices = {pipeline._device_for(module) for _, module in pipeline._modules()}
    return part(name, stage=stage or type(pipeline).__name__, devices=devices, count=count)


def timed_network(network: Network, unet: Any) -> Network:
    """A network that was told what stays the same, each call a part; itself where nobody watches."""
    if not is_watched():
        return network
    config, dtype = getattr(unet, "config", None), dtype_of(unet)

    @cache
    def flops(height: int, width: int, num_text: int) -> float:
        return unet_cost(config, height, width, num_text=num_text).flops if isinstance(config, UNetConfig) else 0.0

    def timed(x_KCHW: Tensor, t: int, joined: Conditioning) -> Tensor:
        with part("unet"):
            per_row = flops(*x_KCHW.shape[-2:], joined.text_BLD.shape[1])
            if per_row:
                work(len(x_KCHW) * per_row, Arithmetic(x_KCHW.device, dtype))
            return network(x_KCHW, t, joined)

    return timed


def timed_predict(predict: Predict) -> Predict:
    """A step's prediction: what is not the network in it is the guidance; what follows it, the sampler's step."""
    if not is_watched():
        return predict

    def timed(x_BCHW: Tensor, t: int) -> Prediction:
        tick()
        with part("guidance"):
            return predict(x_BCHW, t)

    return timed


def timed_encoder(encoder: Any, device: torch.device) -> Any:
    """A text encoder that tells how much it reads, and computes on the device; itself where nobody watches."""
    return _Told(encoder, device) if is_watched() and encoder is not None else encoder


class _Told:
    def __init__(self, encoder: Any, device: torch.device) -> None:
        self._encoder, self._device = encoder, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, ids_BL: Tensor, *args: Any, **options: Any) -> Any:
        tick()
        config = self._encoder.config
        config = config if isinstance(config, Mapping) else config.to_dict()  # ours, or one of transformers
        if not {"d_model", "hidden_size"}.isdisjoint(config):
            flops = len(ids_BL) * encoder_cost(config, num_tokens=ids_BL.shape[1]).flops
            work(flops, Arithmetic(self._device, self._encoder.dtype))
        return self._encoder(ids_BL, *args, **options)


def decoding(vae: Any, z_BZhw: Tensor) -> None:
    """So much is about to be decoded."""
    if not is_watched() or not isinstance(vae, AutoencoderKL):
        return
    height, width = z_BZhw.shape[-2:]
    side = max(height, width) if vae.tile_side is None else vae.tile_side
    num_tiles = len(starts(height, side)) * len(starts(width, side))
    cost = decoder_cost(vae.config, min(side, height), min(side, width))
    work(len(z_BZhw) * num_tiles * cost.flops, Arithmetic(z_BZhw.device, z_BZhw.dtype))
