"""Latents decoded piece by piece: image by image, or in overlapping tiles that fade into each other.

Image by image is exact. Tiles are not: a decoder normalizes over the whole picture, and a tile knows only itself. The
fading hides where tiles meet; what remains is a slight drift of colour and contrast from one to the next.

B images  C channels  H height  W width  Z latent channels  h, w of the latent
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from floyd.errors import ConfigError

OVERLAP = 0.25  # of a tile's side, that it shares with the next


def tiled(decode: Callable[[Tensor], Tensor], z_BZhw: Tensor, *, side: int, factor: int) -> Tensor:
    """Each tile is `side` latents wide and high, or as the latent is; `factor` is how much larger the picture is."""
    if side < 4:
        raise ConfigError(f"A tile must have at least 4 latents on a side, got {side}.")
    height, width = z_BZhw.shape[-2:]
    total: Tensor | None = None
    weight_HW = torch.zeros(height * factor, width * factor, device=z_BZhw.device)
    for top in starts(height, side):
        for left in starts(width, side):
            tile_BCHW = decode(z_BZhw[..., top : top + side, left : left + side])
            if total is None:
                batch, channels = tile_BCHW.shape[:2]
                total = torch.zeros(batch, channels, height * factor, width * factor, device=z_BZhw.device)
            own_HW = _fade(tile_BCHW.shape[-2:], top, left, (height, width), side, factor, z_BZhw.device)
            rows = slice(top * factor, top * factor + tile_BCHW.shape[-2])
            columns = slice(left * factor, left * factor + tile_BCHW.shape[-1])
            total[..., rows, columns] += own_HW * tile_BCHW
            weight_HW[rows, columns] += own_HW
    assert total is not None, "there is at least one tile"
    return (total / weight_HW).to(z_BZhw.dtype)


def starts(length: int, side: int) -> list[int]:
    """Where tiles begin, so that neighbours share a quarter at least and the last one ends with the picture."""
    if length <= side:
        return [0]
    stride = max(1, int(side * (1 - OVERLAP)))
    return [*range(0, length - side, stride), length - side]


def _fade(
    shape: torch.Size, top: int, left: int, whole: tuple[int, int], side: int, factor: int, device: torch.device
) -> Tensor:
    """How much a tile counts at each of its pixels: all in its middle, less and less towards its neighbours."""
    ramps = []
    for length, start, total in zip(shape, (top, left), whole, strict=True):
        width = max(1, int(side * OVERLAP) * factor)
        steps = torch.arange(length, device=device)
        ramp = torch.ones(length, device=device)
        if start > 0:
            ramp = torch.minimum(ramp, (steps + 1) / (width + 1))
        if start + side < total:
            ramp = torch.minimum(ramp, (length - steps) / (width + 1))
        ramps.append(ramp)
    return ramps[0][:, None] * ramps[1][None, :]
