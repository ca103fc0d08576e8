"""What is already painted, and where the sampler may paint.

B images   C channels   H height   W width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from floyd.diffusion.noise import Noise
from floyd.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class Canvas:
    """A task, as data.

    text-to-image   nothing painted, paint everywhere
    image-to-image  start from the noised picture, paint everywhere
    inpainting      start from it too, but paint only where the mask is 1

    The kept region holds the clean picture at every noise level, never a noised one.
    """

    picture_BCHW: Tensor
    is_blank: bool = False
    mask_B1HW: Tensor | None = None  # 1: repaint, 0: keep, between: blend; one mask may serve all images and channels

    def __post_init__(self) -> None:
        if self.picture_BCHW.ndim != 4 or not self.picture_BCHW.is_floating_point():
            raise ValueError(
                "A canvas is a batch of floating point pictures [B, C, H, W], "
                f"got {self.picture_BCHW.dtype} {list(self.picture_BCHW.shape)}."
            )
        if self.mask_B1HW is not None:
            object.__setattr__(self, "mask_B1HW", self._checked(self.mask_B1HW))

    @classmethod
    def blank(
        cls,
        batch: int,
        height: int,
        width: int,
        channels: int = 3,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        return cls(torch.zeros(batch, channels, height, width, device=device, dtype=dtype), is_blank=True)

    def first(self, schedule: NoiseSchedule, t: int, noise: Noise) -> Tensor:
        """What the sampler starts from at noise level `t`; draws noise for the whole picture, once."""
        noise_BCHW = noise(self.picture_BCHW)
        if self.is_blank:
            return noise_BCHW
        return self.keep(schedule.noised(self.picture_BCHW, noise_BCHW, t))

    def keep(self, x_BCHW: Tensor) -> Tensor:
        """`x` with the kept region put back, bit for bit, whatever `x` holds there."""
        if self.mask_B1HW is None:
            return x_BCHW
        mixed_BCHW = (1 - self.mask_B1HW) * self.picture_BCHW + self.mask_B1HW * x_BCHW
        return torch.where(self.mask_B1HW == 0, self.picture_BCHW, mixed_BCHW)

    def _checked(self, mask: Tensor) -> Tensor:
        if self.is_blank:
            raise ValueError("A blank canvas has nothing to keep; a mask needs a picture.")
        fits = mask.ndim == 4 and all(
            size in (1, wanted) for size, wanted in zip(mask.shape[:2], self.picture_BCHW.shape[:2], strict=True)
        )
        if not fits or mask.shape[2:] != self.picture_BCHW.shape[2:]:
            raise ValueError(
                f"The mask must be [1 or B, 1 or C, H, W] for the picture {list(self.picture_BCHW.shape)}, "
                f"got {list(mask.shape)}."
            )
        mask = mask.to(self.picture_BCHW)
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError("The mask must lie in [0, 1]: 1 repaints, 0 keeps.")
        return mask
