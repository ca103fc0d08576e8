"""The picture of IF's watermark, as a component of a checkpoint. `floyd.images.watermark` draws it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from floyd.store.config import Config
from floyd.store.pretrained import Model

SIDE = 62  # pixels


@dataclass(frozen=True, kw_only=True)
class IFWatermarkerConfig(Config):
    """Nothing to configure."""


class IFWatermarker(Model):
    """Holds the watermark, blank (wholly transparent) until a checkpoint is read."""

    config_class = IFWatermarkerConfig
    config: IFWatermarkerConfig
    watermark_image: torch.Tensor  # 0..255, RGBA

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.register_buffer("watermark_image", torch.zeros(SIDE, SIDE, 4))

    @property
    def picture(self) -> np.ndarray:
        """What is drawn: [H, W, 4], uint8, 0..255, the last channel opacity."""
        return self.watermark_image.to("cpu", torch.uint8).numpy()
