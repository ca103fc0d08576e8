"""Training the inside of a UNet on small pictures first: the outer levels do not change the resolution meanwhile.

A UNet for 64 px then takes pictures of 32 or 16 px, and its inner levels see what they will see of 64 px pictures: the
same number of pixels, the same noise, the same edges of the picture. What they learn of places carries over, which it
does not if the whole network is shown smaller pictures. (In the spirit of arXiv:2405.16759, section 3.)
"""

from __future__ import annotations

from torch import nn


def keep_resolution(unet: nn.Module, levels: int) -> None:
    """Make the outermost `levels` levels of an IF UNet keep their resolution, and all others change it.

    A picture of `sample_size / 2**levels` then has as many pixels at each inner level as a whole one.
    """
    down_blocks, up_blocks = list(unet.down_blocks), list(unet.up_blocks)  # type: ignore[arg-type]
    if not 0 <= levels < len(down_blocks):
        raise ValueError(f"levels must be in [0, {len(down_blocks)}), got {levels}.")
    for level, (down, up) in enumerate(zip(down_blocks[:-1], reversed(up_blocks[:-1]), strict=True)):
        is_kept = level < levels
        for sampler in down.downsamplers:
            sampler.resample = None if is_kept else "down"
        for sampler in up.upsamplers:
            sampler.resample = None if is_kept else "up"
