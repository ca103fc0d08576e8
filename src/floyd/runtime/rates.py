"""How fast this machine computes, measured in a moment: the faster of a matrix product and a 3x3 convolution.

It is what torch reaches on an idle machine with work of a good size, not what a datasheet promises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

ENOUGH_S = 0.005  # of one run: as large as that the work is not all overhead
LOOK_S = 0.1  # for each kind of work
SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of matrices
CHANNELS = (64, 128, 256, 512, 1024, 2048)  # of pictures of 32 px


class Arithmetic(NamedTuple):
    """What computes, and in which precision."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Rate:
    arithmetic: Arithmetic
    flops: float  # per second
    threads: int | None  # of the CPU

    def to_json(self) -> dict[str, Any]:
        device, dtype = self.arithmetic
        return {"device": str(device), "dtype": _named(dtype), "flops_per_s": self.flops, "threads": self.threads}

    def __str__(self) -> str:
        device, dtype = self.arithmetic
        threads = "" if self.threads is None else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{_flops(self.flops)} in {_named(dtype)} on {device}{threads}"


def measured(arithmetic: Arithmetic) -> Rate | None:
    """None where this precision cannot be computed in, or memory is full."""
    found = [rate for kind in (_product, _convolution) if (rate := _best(kind, arithmetic))]
    if not found:
        return None
    threads = torch.get_num_threads() if arithmetic.device.type == "cpu" else None
    return Rate(arithmetic, max(found), threads)


@torch.no_grad()
def _best(kind: Callable[[Arithmetic, int], tuple[Callable[[], Any], float]], arithmetic: Arithmetic) -> float:
    """Flops per second, at the size that is large enough; 0 if none could be run."""
    rate = 0.0
    for size in range(len(SIDES)):
        try:
            run, flops = kind(arithmetic, size)
            _seconds(run, arithmetic.device)  # the first run chooses its kernel
            seconds = _seconds(run, arithmetic.device)
            if seconds >= ENOUGH_S or size == len(SIDES) - 1:
                end = perf_counter() + LOOK_S
                while perf_counter() < end:
                    seconds = min(seconds, _seconds(run, arithmetic.device))
        except (RuntimeError, NotImplementedError) as error:  # torch has no one word for it
            log.info("How fast %s computes in %s was not measured: %s", *arithmetic, error)
            return rate
        rate = max(rate, flops / seconds)
        if seconds >= ENOUGH_S:
            break
    return rate


def _product(arithmetic: Arithmetic, size: int) -> tuple[Callable[[], Any], float]:
    side = SIDES[size]
    a, b = _filled(arithmetic, side, side), _filled(arithmetic, side, side)
    return lambda: a @ b, 2.0 * side**3


def _convolution(arithmetic: Arithmetic, size: int) -> tuple[Callable[[], Any], float]:
    batch, side, channels = 2, 32, CHANNELS[size]
    x_BCHW = _filled(arithmetic, batch, channels, side, side).to(memory_format=torch.channels_last)
    weight = _filled(arithmetic, channels, channels, 3, 3).to(memory_format=torch.channels_last)
    return lambda: F.conv2d(x_BCHW, weight, padding=1), 2.0 * batch * channels**2 * 9 * side**2


def _filled(arithmetic: Arithmetic, *shape: int) -> torch.Tensor:
    """Numbers of all kinds: processors run faster on zeros."""
    device, dtype = arithmetic
    whole = torch.Size(shape).numel()
    return torch.linspace(-1, 1, whole, device=device, dtype=torch.float32).to(dtype).view(shape)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    begun = perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return perf_counter() - begun


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.0f} TFLOP/s" if rate >= 10e12 else f"{rate / 1e9:.0f} GFLOP/s"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
