"""What the network is told besides the noisy picture and the time.

B images   C channels   H height   W width   L text tokens   D text width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from floyd.diffusion.noise import Noise
from floyd.diffusion.schedule import NoiseSchedule, at_least_float32


@dataclass(frozen=True, eq=False)
class Conditioning:
    """One branch of the guidance: a prompt and, for super-resolution, the picture to enlarge."""

    text_BLD: Tensor
    low_res_BCHW: Tensor | None = None  # enlarged to the size of x, and noised
    noise_level_B: Tensor | None = None  # how much it was noised

    def __post_init__(self) -> None:
        for name, part in self._parts().items():
            if part is not None and len(part) != len(self.text_BLD):
                raise ValueError(f"{name} has {len(part)} entries for {len(self.text_BLD)} prompts.")

    def joined(self, others: Iterable[Conditioning]) -> Conditioning:
        """All of them as one batch, so that one forward pass serves every branch of the guidance."""
        branches = [self, *others]
        return Conditioning(*(_joined(name, [b._parts()[name] for b in branches]) for name in self._parts()))  # type: ignore[arg-type]

    def apart(self) -> list[Conditioning]:
        """That of each image alone."""
        parts = [[None] * len(self.text_BLD) if part is None else apart(part) for part in self._parts().values()]
        return [Conditioning(*row) for row in zip(*parts, strict=True)]

    def rows(self, some: slice) -> Conditioning:
        """That of some of the images."""
        return Conditioning(*(None if part is None else part[some] for part in self._parts().values()))  # type: ignore[arg-type]

    def takes(self, x_BCHW: Tensor) -> Tensor:
        """`x` as the network reads it: with the low-resolution picture behind it, if there is one."""
        if self.low_res_BCHW is None:
            return x_BCHW
        return torch.cat([x_BCHW, self.low_res_BCHW.to(x_BCHW)], dim=1)

    def _parts(self) -> dict[str, Tensor | None]:
        return {
            "text_BLD": self.text_BLD,
            "low_res_BCHW": self.low_res_BCHW,
            "noise_level_B": self.noise_level_B,
        }


def apart(x: Tensor) -> list[Tensor]:
    """Each image as a batch of its own, in memory of its own: where a tensor begins may decide how it is read."""
    return [row.clone() for row in x.split(1)]


def _joined(name: str, parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) < len(parts):
        raise ValueError(f"Branches of one guidance must agree: {name} is given to {len(present)} of {len(parts)}.")
    if len({part.shape[1:] for part in present}) > 1:
        shapes = ", ".join(str(list(part.shape)) for part in present)
        raise ValueError(f"Branches of one guidance must agree: {name} comes in the shapes {shapes}.")
    return torch.cat(present)


def low_res_condition(
    image_BCHW: Tensor,
    size: tuple[int, int] | torch.Size,
    level: int,
    schedule: NoiseSchedule,
    noise: Noise,
    *,
    extended: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The picture to enlarge, at its new size and noised, and its noise level for each image.

    `extended` continues it to the margin of a canvas that was widened, before it is noised.
    Noise-conditioning augmentation: cascaded diffusion (arXiv:2106.15282), section 4. One draw serves every step and
    every branch of the guidance.
    """
    if not 0 <= level < len(schedule):
        raise ValueError(f"noise_level must be in [0, {len(schedule)}), got {level}.")
    enlarged_BCHW = enlarged(image_BCHW, size)
    if extended is not None:
        enlarged_BCHW = extended(enlarged_BCHW)
    noised_BCHW = schedule.noised(enlarged_BCHW, noise(enlarged_BCHW), level)
    return noised_BCHW, torch.full((len(image_BCHW),), level, device=image_BCHW.device)


def enlarged(image_BCHW: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """As a super-resolution network is shown a small picture: bilinear, corner on corner."""
    large_BCHW = F.interpolate(at_least_float32(image_BCHW), tuple(size), mode="bilinear", align_corners=True)
    return large_BCHW.to(image_BCHW.dtype)
