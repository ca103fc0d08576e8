"""What is already painted, and where the sampler may paint.

B images   C channels   H height   W width
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    The kept region holds the clean picture at every noise level, never a noised one. What is handed out is the upper
    left of a canvas that was `widened`: the network paints on all of it.
    """

    picture_BCHW: Tensor
    is_blank: bool = False
    mask_B1HW: Tensor | None = None  # 1: repaint, 0: keep, between: blend; one mask may serve all images and channels
    soft_B1HW: Tensor | None = None  # the same for the end alone, not above the mask: what is handed out fades in so
    size: tuple[int, int] | None = None  # the rows and columns that are handed out; None: all

    def __post_init__(self) -> None:
        if self.picture_BCHW.ndim != 4 or not self.picture_BCHW.is_floating_point():
            raise ValueError(
                "A canvas is a batch of floating point pictures [B, C, H, W], "
                f"got {self.picture_BCHW.dtype} {list(self.picture_BCHW.shape)}."
            )
        if self.mask_B1HW is not None:
            object.__setattr__(self, "mask_B1HW", self._checked(self.mask_B1HW))
        if self.soft_B1HW is not None:
            object.__setattr__(self, "soft_B1HW", self._checked(self.soft_B1HW))
            if self.mask_B1HW is None or bool((self.soft_B1HW > self.mask_B1HW).any()):
                raise ValueError("A soft mask must not repaint what the mask keeps.")
        if self.size is not None and not all(
            1 <= side <= whole for side, whole in zip(self.size, self.picture_BCHW.shape[2:], strict=True)
        ):
            raise ValueError(f"size must lie within {list(self.picture_BCHW.shape[2:])}, got {list(self.size)}.")

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

    @property
    def sides(self) -> tuple[int, int]:
        """The rows and columns of what is handed out."""
        height, width = self.picture_BCHW.shape[2:]
        return (height, width) if self.size is None else self.size

    def widened(self, multiple: int) -> Self:
        """Sides rounded up to what the network can halve; picture and mask are continued by the pixels at their edge.

        A canvas that fits is left as it is. One that does not draws more noise: the margin's, too.
        """
        height, width = self.picture_BCHW.shape[2:]
        if not (height % multiple or width % multiple):
            return self
        rows, columns = (-(-side // multiple) * multiple for side in (height, width))
        picture_BCHW, mask_B1HW, soft_B1HW = (
            None if part is None else _continued(part, rows, columns)
            for part in (self.picture_BCHW, self.mask_B1HW, self.soft_B1HW)
        )
        assert picture_BCHW is not None
        return replace(self, picture_BCHW=picture_BCHW, mask_B1HW=mask_B1HW, soft_B1HW=soft_B1HW, size=self.sides)

    def extended(self, x_BCHW: Tensor) -> Tensor:
        """What has the size that is handed out, continued to the margin by the pixels at its edge."""
        return x_BCHW if self.size is None else _continued(x_BCHW, *self.picture_BCHW.shape[2:])

    def cropped(self, x_BCHW: Tensor) -> Tensor:
        """The part that is handed out: a view."""
        if self.size is None:
            return x_BCHW
        height, width = self.size
        return x_BCHW[..., :height, :width]

    def with_cropped(self, x_BCHW: Tensor, part_BCHW: Tensor) -> Tensor:
        """`x` with another part to be handed out; the margin stays."""
        if self.size is None:
            return part_BCHW
        height, width = self.size
        changed_BCHW = x_BCHW.clone()
        changed_BCHW[..., :height, :width] = part_BCHW
        return changed_BCHW

    def blended(self, part_BCHW: Tensor) -> Tensor:
        """A finished part, with the given picture shining through where the seam is soft."""
        if self.soft_B1HW is None:
            return part_BCHW
        return _mixed(self.cropped(self.picture_BCHW), part_BCHW, self.cropped(self.soft_B1HW))

    def finished(self, x_BCHW: Tensor) -> Tensor:
        """What is handed out of a clean picture."""
        return self.blended(self.cropped(x_BCHW)).contiguous()

    def first(self, schedule: NoiseSchedule, t: int, noise: Noise) -> Tensor:
        """What the sampler starts from at noise level `t`; draws noise for the whole picture, once."""
        noise_BCHW = noise(self.picture_BCHW)
        if self.is_blank:
            return noise_BCHW
        return self.keep(schedule.noised(self.picture_BCHW, noise_BCHW, t))

    def keep(self, x_BCHW: Tensor) -> Tensor:
        """`x` with the kept region put back, bit for bit, whatever `x` holds there."""
        return self.mixed(self.picture_BCHW, x_BCHW)

    def mixed(self, kept_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """`x` with something else in the kept region."""
        return x_BCHW if self.mask_B1HW is None else _mixed(kept_BCHW, x_BCHW, self.mask_B1HW)

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


def _mixed(kept_BCHW: Tensor, x_BCHW: Tensor, mask_B1HW: Tensor) -> Tensor:
    mixed_BCHW = (1 - mask_B1HW) * kept_BCHW + mask_B1HW * x_BCHW
    return torch.where(mask_B1HW == 0, kept_BCHW, mixed_BCHW)


def _continued(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    rows = torch.arange(height, device=x_BCHW.device).clamp(max=x_BCHW.shape[-2] - 1)
    columns = torch.arange(width, device=x_BCHW.device).clamp(max=x_BCHW.shape[-1] - 1)
    return x_BCHW.index_select(-2, rows).index_select(-1, columns)
