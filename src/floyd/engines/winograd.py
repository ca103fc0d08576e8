"""The engine "winograd": a UNet's step in float32 on the CPU, by kernels of our own.

B images  C channels  H height  W width  L text tokens  E encoder width  D text width in the network  T time width
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn

from floyd.engines.native import KINDS, kernels
from floyd.engines.plain import check_inputs, check_network, embedded, read_label_and_pooled
from floyd.engines.program import Program
from floyd.engines.walk import Walk
from floyd.engines.weights import Weights
from floyd.models.unet import UNet2DConditionModel

_MOST_PROGRAMS = 3  # each has buffers of its own


@dataclass(frozen=True, eq=False)
class WinogradContext:
    """Prompt and noise level, read by every layer."""

    emb_BT: Tensor | None
    texts: tuple[tuple[Tensor, Tensor], ...]  # keys and values, [B, L, heads]
    bias_BL: Tensor | None
    batch: int
    num_tokens: int


class WinogradUNet:
    """A UNet's `read` and `step`, several times as fast.

    Convolutions are Winograd's, norms are fused with what follows them, and the whole step is one call without an
    allocation. The result differs from the network's own by rounding (about 1e-5). Its weights are packed beside the
    network's, four times their size; when these have changed they are packed anew at the next `read`.

    Threads may share it: their steps follow each other, each on all of torch's threads.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        check_network(unet)
        self.unet, self.config = unet, unet.config
        self._kernels = kernels()
        self._lock = Lock()
        self._build()

    def _build(self) -> None:
        self._layers = tuple(self.unet.modules())
        self._weights = Weights(self._kernels)
        self._walk = Walk(self.unet, self._kernels, self._weights)
        self._programs: OrderedDict[tuple[int, ...], Program] = OrderedDict()

    # ---------------------------------------------------------------------------------------------- as the network does

    @torch.no_grad()
    def read(
        self, text_BLE: Tensor, class_labels: Tensor | None = None, encoder_attention_mask: Tensor | None = None
    ) -> WinogradContext:
        """All work that the prompt and the noise level alone decide."""
        with self._lock:
            self._renew()
        unet = self.unet
        text_BLD = text_BLE if unet.encoder_hid_proj is None else unet.encoder_hid_proj(text_BLE)
        bias_BL = None
        if encoder_attention_mask is not None:
            bias_BL = ((1 - encoder_attention_mask.to(text_BLD.dtype)) * -10000.0).contiguous()
        return WinogradContext(
            read_label_and_pooled(unet, text_BLE, class_labels),
            tuple(reader.read(text_BLD) for reader in self._walk.readers),
            bias_BL,
            *text_BLD.shape[:2],
        )

    @torch.no_grad()
    def step(self, sample: Tensor, timestep: Tensor | float, context: WinogradContext) -> Tensor:
        """The prediction at one moment, [B, out_channels, H, W]."""
        return self._stepped(sample, timestep, context, None)

    def profile(self, sample: Tensor, timestep: Tensor | float, context: WinogradContext) -> dict[str, float]:
        """Seconds of one step by kind of operation."""
        times: list[tuple[str, float]] = []
        with torch.no_grad():
            self._stepped(sample, timestep, context, times.append)
        return {kind: sum(own for name, own in times if name == kind) for kind in dict(times)}

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def num_bytes(self) -> int:
        """Of the packed weights, so far."""
        return self._weights.num_bytes()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _renew(self) -> None:
        """After a change to the network: to the modules it is made of, or to their weights."""
        check_network(self.unet)
        layers = tuple(self.unet.modules())
        if len(layers) != len(self._layers) or any(a is not b for a, b in zip(layers, self._layers, strict=True)):
            self._build()
        else:
            self._weights.refresh(probing=True)

    def _stepped(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        context: WinogradContext,
        report: Callable[[tuple[str, float]], None] | None,
    ) -> Tensor:
        x_BCHW = check_inputs(self.unet, sample, context.batch)
        out_BCHW = x_BCHW.new_empty(len(x_BCHW), self.config.out_channels, *x_BCHW.shape[-2:])
        with self._lock:
            self._weights.follow()
            program = self._program(x_BCHW, context)
            emb_BT = embedded(self.unet, timestep, len(x_BCHW), context.emb_BT)
            program.film_BF.copy_(self._walk.films_of(emb_BT))
            for op, layer in program.looks:
                key, value = context.texts[layer]
                op.text_k, op.text_v = key.data_ptr(), value.data_ptr()
                op.text_bias = None if context.bias_BL is None else context.bias_BL.data_ptr()
            seconds = (ctypes.c_double * len(program.ops))() if report else None
            program.run(x_BCHW, out_BCHW, seconds)
        if report and seconds is not None:
            for op, own in zip(program.ops, seconds, strict=True):
                report((KINDS[op.kind], own))
        return out_BCHW

    def _program(self, x_BCHW: Tensor, context: WinogradContext) -> Program:
        batch, _, height, wide = x_BCHW.shape
        key = (batch, height, wide, context.num_tokens)
        if key not in self._programs:
            self._programs[key] = self._walk.program(*key)
        self._programs.move_to_end(key)
        while len(self._programs) > _MOST_PROGRAMS:
            self._programs.popitem(last=False)
        return self._programs[key]


def prepared(unet: nn.Module) -> WinogradUNet:
    """The network's twin, which computes faster, from packed copies of the network's weights."""
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"The engine 'winograd' runs floyd's UNet2DConditionModel, got a {type(unet).__name__}.")
    return WinogradUNet(unet)
