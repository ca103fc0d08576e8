"""From the sampler's tensor to what the caller gets: safety, format, watermark.

B images  C channels  H height  W width
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from floyd.images.convert import pt_to_pil, to_output, to_unit
from floyd.images.watermark import draw
from floyd.pipelines.options import dtype_of
from floyd.runtime.placement import Placement

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Finished:
    """Pictures that were looked at: in [-1, 1], black where the safety checker objects."""

    picture_BCHW: Tensor
    nsfw: list[bool] | None  # None: no checker
    watermarked: list[bool] | None  # the checker suspects somebody else's watermark; the picture is left alone
    watermark: np.ndarray | None  # ours, [H, W, 4] uint8; drawn on PIL pictures

    def pil(self) -> list[Image]:
        pictures = pt_to_pil(self.picture_BCHW)
        return pictures if self.watermark is None else [draw(picture, self.watermark) for picture in pictures]

    def images(self, output_type: str) -> list[Image] | np.ndarray | Tensor:
        return self.pil() if output_type == "pil" else to_output(self.picture_BCHW, output_type)  # type: ignore[arg-type]

    def unit(self) -> Tensor:
        """In [0, 1]: what stage III calls "pt"."""
        return to_unit(self.picture_BCHW)


@dataclass(frozen=True, eq=False)
class Judge:
    """The components that look at finished pictures; each may be absent."""

    safety_checker: Any
    feature_extractor: Any
    watermarker: Any
    placement: Placement

    def look(self, x_BCHW: Tensor) -> Finished:
        watermark = None if self.watermarker is None else self.watermarker.picture
        if self.safety_checker is None:
            return Finished(x_BCHW, None, None, watermark)
        nsfw, watermarked = self._flags(x_BCHW)
        if any(nsfw):
            log.warning(
                "%d of %d pictures look unsafe and are black; try another prompt or seed.", sum(nsfw), len(nsfw)
            )
        flagged_B111 = torch.tensor(nsfw, device=x_BCHW.device).view(-1, 1, 1, 1)
        return Finished(x_BCHW.masked_fill(flagged_B111, -1.0), nsfw, watermarked, watermark)

    def _flags(self, x_BCHW: Tensor) -> tuple[list[bool], list[bool]]:
        prepared = self.feature_extractor(pt_to_pil(x_BCHW), return_tensors="pt").pixel_values
        with self.placement.use(self.safety_checker) as checker:
            device = self.placement.device_of(checker)
            nsfw, watermarked = checker.scores(prepared.to(device, dtype_of(checker))).flags()
        return nsfw, watermarked
