"""The VAE's decoder by the kernels of the engine "winograd": latents to pixels in float32 on the CPU.

B images  C channels  H height  W width  Z, h, w the same of latents
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from floyd.engines.native import kernels
from floyd.engines.plain import check_network
from floyd.engines.program import Map, Program
from floyd.engines.weights import Weights
from floyd.errors import EngineError
from floyd.models.vae import AutoencoderKL
from floyd.nn.autoencoder import PixelAttention, PlainResnetBlock

_ACTS: dict[Callable[[Tensor], Tensor], nn.Module] = {
    F.silu: nn.SiLU(),
    F.gelu: nn.GELU(),
    F.relu: nn.ReLU(),
    F.mish: nn.Mish(),
}


class WinogradDecoder:
    """What `AutoencoderKL.decode` does with whole latents, several times as fast; differs by rounding.

    Packed weights stay; the maps between the layers, which are as large as the picture, are let go after each call.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self._kernels = kernels()
        self._lock = Lock()
        self._build()

    @torch.no_grad()
    def __call__(self, z_BZhw: Tensor) -> Tensor:
        if z_BZhw.dtype != torch.float32 or z_BZhw.device.type != "cpu":
            raise ValueError(f"Engines compute in float32 on the CPU; latents are {z_BZhw.dtype} on {z_BZhw.device}.")
        z_BZhw = z_BZhw.contiguous()
        batch, _, height, wide = z_BZhw.shape
        config, factor = self.vae.config, self.vae.compression
        x_BCHW = z_BZhw.new_empty(batch, config.out_channels, factor * height, factor * wide)
        with self._lock:
            self._renew()
            self._program(batch, height, wide).run(z_BZhw, x_BCHW)
        return x_BCHW

    def _build(self) -> None:
        check_network(self.vae.decoder)
        check_network(self.vae.post_quant_conv)
        self._layers = _layers(self.vae)
        self._weights = Weights(self._kernels)

    def _renew(self) -> None:
        layers = _layers(self.vae)
        if len(layers) != len(self._layers) or any(a is not b for a, b in zip(layers, self._layers, strict=True)):
            self._build()
            return
        check_network(self.vae.decoder)
        self._weights.refresh(probing=True)

    # ---------------------------------------------------------------------------------------------------------- blocks

    def _program(self, batch: int, height: int, wide: int) -> Program:
        to, decoder = Program(self._kernels, self._weights, batch, 0), self.vae.decoder
        x = to.read(self.vae.config.latent_channels, height, wide)
        if isinstance(self.vae.post_quant_conv, nn.Conv2d):
            x = to.conv(x, self.vae.post_quant_conv)
        x = to.conv(x, decoder.conv_in)
        first, last = decoder.mid_block.resnets
        x = self._resnet(to, x, first)
        for attention in decoder.mid_block.attentions:
            x = self._attended(to, x, attention)
        x = self._resnet(to, x, last)
        for block in decoder.up_blocks:
            up: Any = block
            for resnet in up.resnets:
                x = self._resnet(to, x, resnet)
            for sampler in up.upsamplers:
                x = to.conv(x, sampler.conv, size=(2 * x.height, 2 * x.width))
        x = to.norm(x, None, decoder.conv_norm_out, _ACTS[F.silu])
        to.write(to.conv(x, decoder.conv_out))
        to.finish()
        return to

    def _resnet(self, to: Program, x: Map, resnet: nn.Module) -> Map:
        assert isinstance(resnet, PlainResnetBlock)
        act = _ACTS[resnet.act]
        h = to.conv(to.norm(x.keep(), None, resnet.norm1, act), resnet.conv1)
        h = to.norm(h, None, resnet.norm2, act)
        if resnet.conv_shortcut is not None:
            out = (resnet.conv_shortcut.out_channels,)
            weight = self._weights.linear([resnet.conv_shortcut], x.segments, out)
            x = to.linear(x, weight, self._weights.bias([resnet.conv_shortcut], out), out)
        return to.conv(h, resnet.conv2, add=x)

    def _attended(self, to: Program, x: Map, layer: nn.Module) -> Map:
        assert isinstance(layer, PixelAttention)
        one = x.segments
        h = to.norm(x.keep(), None, layer.group_norm)
        projections: list[Any] = [layer.to_q, layer.to_k, layer.to_v]
        weight, bias = self._weights.linear(projections, one, one), self._weights.bias(projections, one)
        h = to.linear(h, weight, bias, one * len(projections))
        h = to.attention(h, one, text=None, num_tokens=0, looks_at_pixels=True)
        last: Any = layer.to_out[0]
        return to.linear(h, self._weights.linear([last], one, one), self._weights.bias([last], one), one, add=x)


def prepared(vae: object) -> WinogradDecoder:
    """EngineError: not on this machine, or not this network."""
    if not isinstance(vae, AutoencoderKL):
        raise EngineError(f"The engine 'winograd' decodes with floyd's AutoencoderKL, not with a {type(vae).__name__}.")
    return WinogradDecoder(vae)


def _layers(vae: AutoencoderKL) -> tuple[nn.Module, ...]:
    return (*vae.decoder.modules(), *vae.post_quant_conv.modules())
