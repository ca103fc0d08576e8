"""How a picture is computed faster without becoming another: one switch for each way, to be measured alone.

Every switch is exact up to rounding. `benchmarks/ladder.py` measures them; what is best for a device is on by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch


@dataclass(frozen=True, kw_only=True)
class Switches:
    """`pipe.switches = Switches(...)`; what is not named is off."""

    read_once: bool = False
    """Layers read prompt and noise level before the first step, not at each."""
    time_table: bool = False
    """What time says to every layer at every step is computed before the first step."""
    fold_scale_shift: bool = False
    """Time's scale and shift become the affine part of the norm before them."""
    fuse_qkv: bool = False
    """Queries, keys and values of the pixels come from one matrix product."""
    rewrite_upsampling: bool = False
    """Doubling and then convolving is one transposed convolution, with 4/9 of the products."""
    channels_last: bool = False
    """Feature maps, those of the VAE's decoder too, lie in memory pixel by pixel."""
    pack_convolutions: bool = False
    """Weights of 3x3 convolutions lie as the CPU's kernels want them; takes as much memory again as they do."""
    compiled: bool = False
    """The step is compiled by torch.compile, which takes minutes at the first picture; weights are not packed then."""
    graphs: bool = False
    """On CUDA, the step is recorded as a graph and replayed; elsewhere there is nothing to record."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                raise TypeError(f"The switch {field.name} is on or off, True or False; got {value!r}.")
        needed = [name for name in _NEED_READING if getattr(self, name)]
        if needed and not self.read_once:
            raise ValueError(f"{', '.join(needed)} needs read_once too: what is made ready is kept with what was read.")

    @classmethod
    def off(cls) -> Self:
        return cls()

    @classmethod
    def on(cls) -> Self:
        """All that begin at once: not `compiled`."""
        return cls(**{field.name: field.name != "compiled" for field in fields(cls)})

    @classmethod
    def best_for(cls, device: torch.device | str) -> Self:
        """What is on unless it is told otherwise."""
        every = replace(cls.on(), graphs=False)
        if torch.device(device).type == "cpu":
            return every
        return replace(every, rewrite_upsampling=False, channels_last=False, pack_convolutions=False)

    def without_copies(self) -> Self:
        """Of weights, which is for where memory is short."""
        return replace(self, fuse_qkv=False, rewrite_upsampling=False, pack_convolutions=False)

    def when_compiled(self, device: torch.device | str) -> Self:
        """With what makes the most of a compiler on a device; as it is where there is none worth waiting for."""
        kind = torch.device(device).type
        if kind not in ("cpu", "cuda", "xpu"):
            return self
        return replace(self, read_once=True, compiled=True, graphs=self.graphs or kind == "cuda")


_NEED_READING = (
    "time_table",
    "fold_scale_shift",
    "fuse_qkv",
    "rewrite_upsampling",
    "channels_last",
    "pack_convolutions",
    "compiled",
    "graphs",
)
