"""The only source of chance in a picture.

B images   C channels   H height   W width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import count
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
            raise ValueError(_mismatch(len(self.generator), shape[0]))
        return torch.cat([_drawn((1, *shape[1:]), generator, dtype, device) for generator in self.generator])

    def apart(self, num_images: int) -> list[Noise]:
        """The noise of each image alone, for whoever paints one after the other; all must draw equally often.

        With one generator for all, whoever draws first draws for all, and the others get their part of it.
        """
        if isinstance(self.generator, Sequence):
            if len(self.generator) != num_images:
                raise ValueError(_mismatch(len(self.generator), num_images))
            return [Noise(generator) for generator in self.generator]
        if num_images == 1:
            return [self]
        draws: list[Tensor] = []
        return [_Part(whole=self, num_images=num_images, place=i, draws=draws) for i in range(num_images)]


@dataclass(frozen=True, eq=False)
class _Part(Noise):
    """One image's part of draws that are made for all of them at once."""

    _: KW_ONLY
    whole: Noise
    num_images: int
    place: int
    draws: list[Tensor]  # shared by all parts
    turn: Iterator[int] = field(default_factory=count)

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        turn = next(self.turn)
        if turn == len(self.draws):
            self.draws.append(self.whole.normal((self.num_images, *shape[1:]), dtype=dtype, device=device))
        return self.draws[turn][self.place : self.place + 1].clone()


def _mismatch(num_generators: int, num_images: int) -> str:
    return f"Got {num_generators} generators for {num_images} images; pass one generator, or one per image."


def _drawn(shape: Sequence[int], generator: Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    source = generator.device if generator is not None else device
    if source.type not in ("cpu", device.type):
        raise ValueError(
            f"A generator on {source.type} cannot draw for a tensor on {device.type}; make it with "
            f"torch.Generator({device.type!r}), or on the CPU, which serves every device."
        )
    drawn = torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype)
    if device.type == "cuda" and source.type == "cpu":
        return drawn.pin_memory().to(device, non_blocking=True)  # the next kernels wait for it, this thread does not
    return drawn.to(device)
