"""The only source of chance in a picture.

B images   C channels   H height   W width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor


@dataclass(frozen=True, eq=False)
class Noise:
    """Normal noise from one generator, or from one per image; draws are made in a documented order.

    A generator draws on its own device, in the dtype asked for, and the result is moved: a seed on the CPU gives the
    same picture wherever the model runs. Several generators draw one image each, so an image does not depend on its
    neighbours in the batch.
    """

    generator: Generator | Sequence[Generator] | None = None

    def __post_init__(self) -> None:
        if self.generator is None or isinstance(self.generator, Generator):
            return
        generators = tuple(self.generator) if isinstance(self.generator, Sequence) else (self.generator,)
        if not generators or not all(isinstance(g, Generator) for g in generators):
            raise TypeError(f"generator must be None, a torch.Generator or a list of them, got {self.generator!r}.")
        object.__setattr__(self, "generator", generators[0] if len(generators) == 1 else generators)

    @classmethod
    def seeded(cls, seed: int | Sequence[int]) -> Self:
        """From one seed, or from one per image; drawn on the CPU, so the same everywhere."""
        if isinstance(seed, int):
            return cls(Generator().manual_seed(seed))
        return cls([Generator().manual_seed(s) for s in seed])

    def __call__(self, like_BCHW: Tensor) -> Tensor:
        return self.normal(like_BCHW.shape, dtype=like_BCHW.dtype, device=like_BCHW.device)

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        device = torch.device(device)
        if not isinstance(self.generator, Sequence):
            return _drawn(shape, self.generator, dtype, device)
        if len(self.generator) != shape[0]:
            raise ValueError(
                f"Got {len(self.generator)} generators for {shape[0]} images; pass one generator, or one per image."
            )
        return torch.cat([_drawn((1, *shape[1:]), generator, dtype, device) for generator in self.generator])


def _drawn(shape: Sequence[int], generator: Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    source = generator.device if generator is not None else device
    if source.type not in ("cpu", device.type):
        raise ValueError(
            f"A generator on {source.type} cannot draw for a tensor on {device.type}; make it with "
            f"torch.Generator({device.type!r}), or on the CPU, which serves every device."
        )
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
