"""The safety checker: does a picture look unsafe, does it look as if it bore a watermark?

B images  C channels  H height  W width  E embedding width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from floyd.store.config import Config
from floyd.store.pretrained import Model

if TYPE_CHECKING:
    import numpy as np

THRESHOLD = 0.5  # of a logit, as the incumbent compares; the original compared its sigmoid, which is a logit of 0

Pictures = TypeVar("Pictures", "np.ndarray", Tensor, "list[np.ndarray]", "list[Tensor]")


@dataclass(frozen=True, kw_only=True)
class IFSafetyCheckerConfig(Config):
    """A CLIPConfig's file, of which only the vision tower is read; the rest is kept."""

    vision_config: Mapping[str, Any] = field(default_factory=dict)


class SafetyScores(NamedTuple):
    """Logits: the larger, the surer."""

    nsfw_B: Tensor
    watermark_B: Tensor

    def flags(self, p_threshold: float = THRESHOLD, w_threshold: float = THRESHOLD) -> tuple[list[bool], list[bool]]:
        """What is above the thresholds: unsafe pictures, watermarked pictures. What is no number counts as above."""
        return _above(self.nsfw_B, p_threshold), _above(self.watermark_B, w_threshold)


class IFSafetyChecker(Model):
    """Two linear judges of a picture's CLIP embedding."""

    config_class = IFSafetyCheckerConfig
    config: IFSafetyCheckerConfig
    weights_name: ClassVar[str] = "model"  # the incumbent's checker is a model of transformers

    def __init__(self, **keywords: Any) -> None:
        from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__(**keywords)
        vision_config = CLIPConfig.from_dict(deepcopy(self.config.to_json())).vision_config
        assert isinstance(vision_config, CLIPVisionConfig)
        vision_config.dtype = None  # what a file says of its weights must not decide how the tower is built
        self.vision_model = CLIPVisionModelWithProjection(vision_config)
        self.p_head = nn.Linear(vision_config.projection_dim, 1)
        self.w_head = nn.Linear(vision_config.projection_dim, 1)

    @torch.no_grad()
    def scores(self, clip_input_BCHW: Tensor) -> SafetyScores:
        """Both judgements on pictures that the feature extractor has prepared."""
        embedding_BE = self.vision_model(clip_input_BCHW).image_embeds
        return SafetyScores(self.p_head(embedding_BE).flatten(), self.w_head(embedding_BE).flatten())

    def forward(
        self,
        clip_input_BCHW: Tensor,
        images: Pictures,
        p_threshold: float = THRESHOLD,
        w_threshold: float = THRESHOLD,
    ) -> tuple[Pictures, list[bool], list[bool]]:
        """The pictures, in [0, 1], with zeros instead of the flagged ones; then both lists of flags."""
        if len(images) != len(clip_input_BCHW):
            raise ValueError(f"Got {len(images)} images but clip_input of {len(clip_input_BCHW)}: pass one for each.")
        nsfw, watermarked = self.scores(clip_input_BCHW).flags(p_threshold, w_threshold)
        return _blackened(images, [a or b for a, b in zip(nsfw, watermarked, strict=True)]), nsfw, watermarked


def _above(scores_B: Tensor, threshold: float) -> list[bool]:
    flags: list[bool] = (~((scores_B <= threshold) & scores_B.isfinite())).tolist()
    return flags


def _blackened(images: Pictures, flags: Sequence[bool]) -> Pictures:
    kept = deepcopy(images)
    for index in (index for index, is_flagged in enumerate(flags) if is_flagged):
        kept[index][...] = 0
    return kept
