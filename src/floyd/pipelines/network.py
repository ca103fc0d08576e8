"""The UNet as the engine calls it: told once what stays the same, cast to its precision at its border.

K all branches' images  C channels  H height  W width  L text tokens  D text width
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from floyd.adapters.calls import call_scale
from floyd.diffusion.conditioning import Conditioning
from floyd.diffusion.guidance import Network
from floyd.models.unet_told import Context, Ready
from floyd.pipelines.options import dtype_of, lora_scale
from floyd.runtime.graphs import Graphed, can_record
from floyd.runtime.machine import computes_in
from floyd.runtime.switches import Switches
from floyd.store.layout import uncompiled

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Networks:
    """What is the same for all whom a UNet is told about in one chain: its weights, and the steps to come."""

    unet: Any
    switches: Switches
    timesteps: Sequence[int] = ()
    attention: Mapping[str, Any] | None = None  # the call's cross_attention_kwargs
    ready: Ready | None = None

    @classmethod
    def of(
        cls, unet: Any, switches: Switches, timesteps: Sequence[int] = (), attention: Mapping[str, Any] | None = None
    ) -> Networks:
        return cls(unet, switches, tuple(timesteps), attention).renewed()

    def at(self, timesteps: Sequence[int]) -> Networks:
        """For other steps, over the same copies of the weights."""
        return replace(self, timesteps=tuple(timesteps))

    @property
    def scale(self) -> float:
        """How many times as strongly LoRA acts; another's network weighs its own."""
        return lora_scale(self.attention) if is_ours(self.unet) else 1.0

    def renewed(self) -> Networks:
        """With copies of the weights as they are now."""
        if not (is_ours(self.unet) and self.switches.read_once) or is_engine(self.unet):
            return self
        rewrites = self.switches
        if rewrites.compiled or is_compiled(self.unet):
            rewrites = replace(rewrites, pack_convolutions=False)  # the compiler lays weights out itself
        return replace(self, ready=uncompiled(self.unet).ready(rewrites))

    def told(self, told: Conditioning, max_rows: int | None = None) -> Network:
        """The network for one conditioning, which it reads now, with at most `max_rows` rows at once."""
        if max_rows is not None and len(told.text_BLD) > max_rows:
            rows = [slice(first, first + max_rows) for first in range(0, len(told.text_BLD), max_rows)]
            calls = [self.told(told.rows(some)) for some in rows]
            return lambda x_KCHW, t, joined: torch.cat(
                [call(x_KCHW[some], t, joined.rows(some)) for call, some in zip(calls, rows, strict=True)]
            )
        dtype = dtype_of(self.unet, told.text_BLD.dtype)
        if not computes_in(dtype, told.text_BLD.device):
            _warn_of_emulation(dtype)
        if is_engine(self.unet):
            return _OnEngine(self.unet, told.text_BLD.to(dtype), told.noise_level_B, dtype)
        if not (is_ours(self.unet) and self.switches.read_once):
            return _Whole(self, told.text_BLD.to(dtype), told.noise_level_B, dtype)
        return _Stepping(self, told.text_BLD.to(dtype), told.noise_level_B, dtype)


class _Stepping:
    """Our UNet: it reads once, and again if somebody writes to its weights meanwhile."""

    def __init__(self, networks: Networks, text_KLD: Tensor, level_K: Tensor | None, dtype: torch.dtype) -> None:
        self.networks, self.text_KLD, self.level_K, self.dtype = networks, text_KLD, level_K, dtype
        self.unet = uncompiled(networks.unet)
        self.context = self._read()

    def __call__(self, x_KCHW: Tensor, t: int, joined: Conditioning) -> Tensor:
        if not self.context.is_current:
            self.networks = self.networks.renewed()
            self.context = self._read()
        sample = joined.takes(x_KCHW).to(self.dtype)
        with call_scale(self.networks.scale):
            if is_compiled(self.networks.unet):
                out: Tensor = self.networks.unet(sample, _time(t, x_KCHW), context=self.context, return_dict=False)[0]
                return out
            return self.paint(sample, self.unet.time(t, self.context, sample))

    def _read(self) -> Context:
        networks, switches = self.networks, self.networks.switches
        timesteps = networks.timesteps if switches.time_table else ()
        with call_scale(networks.scale):
            context: Context = self.unet.read(self.text_KLD, self.level_K, ready=networks.ready, timesteps=timesteps)
        is_free = networks.ready is not None  # somebody watches the others, or moves their weights about
        paint = self.unet.paint
        if switches.compiled and is_free:
            paint = torch.compile(paint, fullgraph=True, dynamic=False)
        self.paint: Callable[..., Tensor] = partial(paint, context=context)
        if switches.graphs and is_free and can_record(self.text_KLD):
            self.paint = Graphed(self.paint)
        return context


class _OnEngine:
    """An engine in the UNet's place: it reads once, and looks after the weights itself."""

    def __init__(self, engine: Any, text_KLD: Tensor, level_K: Tensor | None, dtype: torch.dtype) -> None:
        self.engine, self.dtype = engine, dtype
        self.context = engine.read(text_KLD, level_K)

    def __call__(self, x_KCHW: Tensor, t: int, joined: Conditioning) -> Tensor:
        out: Tensor = self.engine.step(joined.takes(x_KCHW).to(self.dtype), t, self.context)
        return out


class _Whole:
    """A UNet that reads anew at every step: of another make, or because that is wanted."""

    def __init__(self, networks: Networks, text_KLD: Tensor, level_K: Tensor | None, dtype: torch.dtype) -> None:
        self.unet, self.scale, self.text_KLD, self.dtype = networks.unet, networks.scale, text_KLD, dtype
        self.extra: dict[str, Any] = {} if level_K is None else {"class_labels": level_K}
        if networks.attention and not is_ours(self.unet):
            self.extra["cross_attention_kwargs"] = dict(networks.attention)

    def __call__(self, x_KCHW: Tensor, t: int, joined: Conditioning) -> Tensor:
        sample = joined.takes(x_KCHW).to(self.dtype)
        told = {"encoder_hidden_states": self.text_KLD, "return_dict": False, **self.extra}
        with call_scale(self.scale):
            out: Tensor = self.unet(sample, _time(t, x_KCHW), **told)[0]
        return out


def is_ours(unet: Any) -> bool:
    """Another's network must be told everything anew at each step."""
    return hasattr(type(uncompiled(unet)), "read")


def is_engine(unet: Any) -> bool:
    """Whether it stands for a UNet that it holds: see engines."""
    return is_ours(unet) and not hasattr(type(uncompiled(unet)), "ready")


def is_compiled(unet: Any) -> bool:
    """A compiled network must be called as it was compiled, whole; its methods would run the slow original."""
    return uncompiled(unet) is not unet or getattr(unet, "_compiled_call_impl", None) is not None


def _time(t: int, like: Tensor) -> Tensor:
    return torch.tensor(t, device=like.device)  # a tensor, so that a compiled network is not compiled for every number


@cache
def _warn_of_emulation(dtype: torch.dtype) -> None:
    """Once."""
    log.warning(
        "This processor has no instructions for %s, so each step takes many times as long as in float32: load the "
        "pipeline with torch_dtype=torch.float32, in fewer bits with quantization='int8', or with memory='auto'.",
        str(dtype).removeprefix("torch."),
    )
