"""In what training computes: bfloat16 where the processor has instructions for it, float32 where it has not.

A processor without them is made to compute in bfloat16 all the same, and takes many times as long for it as in float32.
"""

from __future__ import annotations

from functools import cache

import torch

PRECISIONS = ("auto", "bf16", "fp32")  # "auto": see `chosen`


def chosen(precision: str, device: torch.device) -> str:
    """bf16 or fp32: the one that was asked for, of "auto" the faster one on this device."""
    if precision != "auto":
        return precision
    return "bf16" if computes_in_bfloat16(device) else "fp32"


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type != "cpu" or _cpu_does()


@cache
def _cpu_does() -> bool:
    """oneDNN emulates bfloat16 by AVX-512 where that alone is there; without AVX-512 nothing of it is fast."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    cpu = torch.cpu
    is_emulated = cpu._is_avx512_supported() and not (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
    return not is_emulated
