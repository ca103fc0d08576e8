"""Batches of captioned scenes, each decided by (seed, step) alone.

B images  C channels  H height  W width  L text tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from floyd.scenes.captions import Caption, captioned
from floyd.scenes.render import render, render_crop
from floyd.scenes.scene import Scene

Pixels = npt.NDArray[np.uint8]
COUNT_SHARES = (0.3, 0.45, 0.25)  # of training scenes with one, two, three things: every thing teaches its shape
EMPTY_SHARE = 0.1  # of captions left out, for guidance (arXiv:2207.12598)


@dataclass(frozen=True)
class Crop:
    """A window of a picture that is `size` on a side; lengths in pixels."""

    size: int
    top: int
    left: int
    side: int


def scenes_at(seed: int, step: int, batch: int) -> list[tuple[Scene, Caption]]:
    """The training scenes of one step; held-out pairs never occur."""
    rng = np.random.default_rng((seed, step))
    counts = rng.choice((1, 2, 3), size=batch, p=COUNT_SHARES)
    return [captioned(rng, things=int(count)) for count in counts]


def texts_of(scenes: Sequence[tuple[Scene, Caption]], generator: torch.Generator) -> list[str]:
    """The captions, some of them left out by lot."""
    is_empty_B = torch.rand(len(scenes), generator=generator) < EMPTY_SHARE
    return ["" if empty else caption.text for empty, (_, caption) in zip(is_empty_B, scenes, strict=True)]


def to_tensor(pictures: Sequence[Pixels]) -> Tensor:
    """uint8 pictures [H, W, C] as one float tensor [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def pictures_of(scenes: Sequence[tuple[Scene, Caption]], size: int) -> Tensor:
    return to_tensor([render(scene, size) for scene, _ in scenes])


def things_of(scenes: Sequence[tuple[Scene, Caption]], size: int) -> Tensor:
    """Which pixels show a thing: [B, 1, H, W] in {0, 1}."""
    empty = [replace(scene, things=(), position=None, relation=None, row=False) for scene, _ in scenes]
    grounds_BCHW = to_tensor([render(scene, size) for scene in empty])
    return ((pictures_of(scenes, size) - grounds_BCHW).abs().sum(dim=1, keepdim=True) > 0.3).float()


def crops_of(scenes: Sequence[tuple[Scene, Caption]], crops: Sequence[Crop]) -> Tensor:
    return to_tensor(
        [
            render_crop(scene, crop.size, crop.top, crop.left, crop.side, crop.side)
            for (scene, _), crop in zip(scenes, crops, strict=True)
        ]
    )
