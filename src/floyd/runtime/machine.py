"""How fast a machine is, as far as a memory plan must know. A plan weighs carrying against computing, so only the
proportions matter; each figure says where it comes from.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates that networks reach, not those of datasheets; per second."""

    name: str
    flops: float  # in the precision it computes in
    memory_bytes: float  # of the memory that it computes from
    link_bytes: float  # main memory to card, from pinned pages
    disk_bytes: float = 2.0e9  # a solid-state disk, or pages that the system has kept
    half: str = "bfloat16"  # the 16-bit precision it computes in; float32 if it has none

    @property
    def has_card(self) -> bool:
        return self.link_bytes > 0


# Half of what the vendor's table says of dense 16-bit arithmetic, 0.7 of its memory bandwidth; links: PCIe 3, 4 and 5
# with 16 lanes carry 12, 24 and 50 GB/s. Pattern in the device's name -> (flops, memory, link, half).
_CARDS: dict[str, tuple[float, float, float, str]] = {
    "H200": (450e12, 3.4e12, 50e9, "bfloat16"),
    "H100": (450e12, 2.3e12, 50e9, "bfloat16"),
    "B200": (1000e12, 5.6e12, 50e9, "bfloat16"),
    "A100": (150e12, 1.2e12, 24e9, "bfloat16"),
    "L40": (150e12, 0.6e12, 24e9, "bfloat16"),
    "L4": (60e12, 0.21e12, 24e9, "bfloat16"),
    "T4": (30e12, 0.22e12, 12e9, "float16"),
    "V100": (55e12, 0.63e12, 12e9, "float16"),
    "RTX 5090": (105e12, 1.25e12, 50e9, "bfloat16"),
    "RTX 4090": (80e12, 0.7e12, 24e9, "bfloat16"),
    "RTX 3090": (35e12, 0.65e12, 24e9, "bfloat16"),
}
# A card of the middle class on PCIe 4 with 16 lanes: what a plan is for when no card is there to ask.
ANY_CARD = Machine(name="a card of the middle class", flops=30e12, memory_bytes=0.35e12, link_bytes=20e9)

_CORE_FLOPS = 0.1e12  # a core with wide vectors, float32: measured, 0.2e12 on two of 2022
_CPU_MEMORY_BYTES = 30e9  # measured: copying on the same machine


def this_machine() -> Machine:
    """What torch finds here."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for pattern, (flops, memory, link, half) in _CARDS.items():
            if pattern in name:
                return Machine(name=name, flops=flops, memory_bytes=memory, link_bytes=link, half=half)
        half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
        known = ANY_CARD
        return Machine(
            name=name, flops=known.flops, memory_bytes=known.memory_bytes, link_bytes=known.link_bytes, half=half
        )
    if torch.accelerator.is_available():
        return ANY_CARD
    return cpu()


def cpu() -> Machine:
    """Without a card: 16 bits save memory there, where they are not emulated, and are not counted on to save time."""
    import torch

    half = "bfloat16" if computes_in(torch.bfloat16, torch.device("cpu")) else "float32"
    flops = _CORE_FLOPS * (os.cpu_count() or 1)
    return Machine(name="the CPU", flops=flops, memory_bytes=_CPU_MEMORY_BYTES, link_bytes=0, half=half)


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has instructions for it. A CPU without takes many times as long as in float32."""
    import torch

    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or _cpu_computes_in(dtype)


def _cpu_computes_in(half: torch.dtype) -> bool:
    """oneDNN emulates both by AVX-512 where that alone is there; without AVX-512 nothing of it is fast."""
    import torch

    ops, cpu = torch.ops.mkldnn, torch.cpu
    if not torch.backends.mkldnn.is_available():
        return False
    if half == torch.float16:
        return bool(ops._is_mkldnn_fp16_supported())
    is_emulated = cpu._is_avx512_supported() and not (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
    return bool(ops._is_mkldnn_bf16_supported()) and not is_emulated
