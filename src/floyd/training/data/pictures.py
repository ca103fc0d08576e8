"""Pictures ready for training: checked before it begins, cut to squares, in an order that (seed, epoch) decides.

B images  C channels  H height  W width
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from floyd.images.convert import to_tensor
from floyd.images.load import picture_in
from floyd.images.resize import square
from floyd.text.cleaning import preprocess
from floyd.training.data.sources import Item, found

log = logging.getLogger(__name__)

POLICIES = ("error", "skip")
CROPS = ("center", "random")
_SHOWN = 5  # of many bad files
_AT_ONCE = 8  # files that are read in parallel


@dataclass(frozen=True)
class Window:
    """How a picture becomes a square: where along its longer side, 0..1, and whether mirrored."""

    place: float = 0.5
    is_flipped: bool = False


@dataclass(frozen=True)
class Pictures:
    """Checked pictures with a caption each, cleaned as prompts are at inference."""

    items: tuple[Item, ...]
    captions: tuple[str, ...]

    @classmethod
    def of(
        cls,
        data: str | Path,
        *,
        caption: str | None = None,
        clean_caption: bool = True,
        on_bad: str = "error",
        on_checked: Callable[[int, int], None] | None = None,
    ) -> Pictures:
        """All of a folder's or of shards' that can be used.

        `caption` is that of pictures that have none of their own. `on_bad`: "error" names what cannot be used, "skip"
        leaves it out and says so in the log. `on_checked` hears (files looked at, files in all).
        """
        if on_bad not in POLICIES:
            raise ValueError(f"on_bad must be one of {', '.join(POLICIES)}, got {on_bad!r}.")
        items = [item if item.caption or caption is None else replace(item, caption=caption) for item in found(data)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            faults = []
            for count, fault in enumerate(pool.map(_fault, items), start=1):
                faults.append(fault)
                if on_checked is not None:
                    on_checked(count, len(items))
        bad = [f"{item.name}: {fault}" for item, fault in zip(items, faults, strict=True) if fault]
        good = tuple(item for item, fault in zip(items, faults, strict=True) if not fault)
        if bad and (on_bad == "error" or not good):
            more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            way = "" if not good else " Mend or remove them, or pass on_bad='skip'."
            raise ValueError(
                f"{len(bad)} of {len(items)} pictures cannot be used. {'; '.join(bad[:_SHOWN])}{more}.{way}"
            )
        for line in bad:
            log.warning("Left out: %s.", line)
        return cls(good, tuple(preprocess([str(item.caption) for item in good], clean_caption=clean_caption)))

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Sequence[int], side: int, windows: Sequence[Window]) -> Tensor:
        """[B, 3, side, side] in [-1, 1]."""
        pairs = list(zip(indices, windows, strict=True))
        if len(pairs) < 2:
            return torch.cat([self._picture(index, side, window) for index, window in pairs])
        with ThreadPoolExecutor(min(_AT_ONCE, len(pairs))) as pool:
            return torch.cat(list(pool.map(lambda pair: self._picture(pair[0], side, pair[1]), pairs)))

    def _picture(self, index: int, side: int, window: Window) -> Tensor:
        item = self.items[index]
        picture = picture_in(item.content(), item.name)
        return to_tensor(square(picture, side, place=window.place, is_flipped=window.is_flipped))


def _fault(item: Item) -> str | None:
    """Why a picture cannot be used. It is decoded whole: a file may break off after its head."""
    if not item.caption:
        return "it has no caption (metadata.jsonl, a .txt beside it, or a caption for all)"
    try:
        picture = picture_in(item.content(), item.name)
    except (OSError, ValueError) as error:
        return f"it cannot be read ({' '.join(str(error).split())})"
    return None if min(picture.size) > 1 else f"it has {picture.width}x{picture.height} pixels"


@lru_cache(maxsize=4)
def order(num: int, seed: int, epoch: int) -> np.ndarray:
    """In which order an epoch shows its pictures."""
    return np.random.default_rng((seed, epoch)).permutation(num)


def indices_at(step: int, batch: int, num: int, seed: int) -> list[int]:
    """Which pictures a step sees. A batch may begin in one epoch and end in the next."""
    return [int(order(num, seed, place // num)[place % num]) for place in range(step * batch, (step + 1) * batch)]


def windows_for(batch: int, crop: str, flip: bool, generator: torch.Generator) -> list[Window]:
    """By lot; the draws are the same whatever is wished, so that a wish changes nothing else."""
    place_B, side_B = torch.rand(2, batch, generator=generator).tolist()
    return [
        Window(place if crop == "random" else 0.5, flip and side < 0.5)
        for place, side in zip(place_B, side_B, strict=True)
    ]
