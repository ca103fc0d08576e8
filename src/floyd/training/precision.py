"""In what training computes: bfloat16 where the device has instructions for it, float32 where it has not."""

from __future__ import annotations

import torch

from floyd.runtime.machine import computes_in

PRECISIONS = ("auto", "bf16", "fp32")  # "auto": see `chosen`


def chosen(precision: str, device: torch.device) -> str:
    """bf16 or fp32: the one that was asked for, of "auto" the faster one on this device."""
    if precision != "auto":
        return precision
    return "bf16" if computes_in(torch.bfloat16, device) else "fp32"
