"""From the sampler's tensor to what the caller gets: safety, format, watermark.

Every picture is looked at, whatever the format; what the safety checker could not judge counts as unsafe.

B images  C channels  H height  W width
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from floyd.diffusion.conditioning import apart
from floyd.errors import SafetyError
from floyd.images.colors import averaged
from floyd.images.convert import pt_to_pil, to_output, to_unit
from floyd.images.watermark import draw
from floyd.models.safety import THRESHOLD, SafetyScores
from floyd.pipelines.options import Action, dtype_of
from floyd.runtime.clock import part
from floyd.runtime.placement import Placement

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

log = logging.getLogger(__name__)

BLUR_CELLS = 4  # a blurred picture keeps the mean colours of so many fields in each direction


@dataclass(frozen=True, eq=False)
class Finished:
    """Pictures that were looked at: in [-1, 1], the unsafe ones as the action left them."""

    picture_BCHW: Tensor
    nsfw: list[bool] | None  # None: no checker
    watermarked: list[bool] | None  # the checker suspects somebody else's watermark; the picture is left alone
    watermark: np.ndarray | None  # ours, [H, W, 4] uint8; drawn on PIL pictures
    nsfw_scores: list[float] | None = None  # logits; not a number where the checker gave none
    watermark_scores: list[float] | None = None
    hidden: list[bool] | None = None  # which pictures the action replaced

    def pil(self) -> list[Image]:
        pictures = pt_to_pil(self.picture_BCHW)
        return pictures if self.watermark is None else [draw(picture, self.watermark) for picture in pictures]

    def images(self, output_type: str) -> list[Image] | np.ndarray | Tensor:
        if output_type == "pil":
            return self.pil()
        if self.watermark is not None:
            log.info("The watermark is drawn on PIL pictures; output_type %r is for further work.", output_type)
        return to_output(self.picture_BCHW, output_type)  # type: ignore[arg-type]

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
    one_by_one: bool = False  # the checker sees each picture alone

    def look(
        self, x_BCHW: Tensor, action: Action = "black", *, before: Finished | None = None, is_preview: bool = False
    ) -> Finished:
        """`before`: the same pictures before they were enlarged. What was unsafe stays so, and is not told twice.

        A preview is not told about, and does not raise.
        """
        watermark = None if self.watermarker is None else self.watermarker.picture
        if is_preview and action == "raise":
            action = "black"
        if self.safety_checker is None:
            known = None if before is None else before.nsfw
            treatments: list[Action] = [action if was_unsafe else "flag" for was_unsafe in known or ()]
            return Finished(_treated(x_BCHW, treatments), known, None, watermark)
        with part("safety"):
            reports = self._reports(x_BCHW, before)
        if not is_preview:
            _tell(reports, action)
        treatments = [report.treatment(action) for report in reports]
        return Finished(
            _treated(x_BCHW, treatments),
            [report.is_unsafe for report in reports],
            [report.is_marked for report in reports],
            watermark,
            [report.nsfw_score for report in reports],
            [report.watermark_score for report in reports],
            [treatment in _HIDES for treatment in treatments],
        )

    def _reports(self, x_BCHW: Tensor, before: Finished | None) -> list[_Report]:
        pictures = pt_to_pil(x_BCHW)
        count, scores = len(pictures), self._scores(pictures)
        if (len(scores.nsfw_B), len(scores.watermark_B)) != (count, count):
            raise SafetyError(
                f"The safety checker gave {len(scores.nsfw_B)} and {len(scores.watermark_B)} scores for {count} "
                "pictures, so none is handed out. Load the checker that belongs to the weights."
            )
        was_unsafe = (before and before.nsfw) or [False] * count
        was_marked = (before and before.watermarked) or [False] * count
        rows = (*scores.flags(), scores.nsfw_B.tolist(), scores.watermark_B.tolist(), was_unsafe, was_marked)
        return [_Report(f"{i + 1} of {count}", *row) for i, row in enumerate(zip(*rows, strict=True))]

    def _scores(self, pictures: list[Image]) -> SafetyScores:
        try:
            prepared = self.feature_extractor(pictures, return_tensors="pt").pixel_values
            with self.placement.use(self.safety_checker) as checker:
                device = self.placement.device_of(checker)
                pixels = prepared.to(device, dtype_of(checker))
                if not self.one_by_one:
                    scores: SafetyScores = checker.scores(pixels)
                    return scores
                nsfw, watermark = zip(*(checker.scores(own) for own in apart(pixels)), strict=True)
                return SafetyScores(torch.cat(nsfw), torch.cat(watermark))
        except Exception as error:
            raise SafetyError(
                f"The safety checker could not look at the pictures ({type(error).__name__}: {error}), so none is "
                "handed out. Mend the cause, or load the checker and its feature_extractor anew."
            ) from error


@dataclass(frozen=True)
class _Report:
    """What the checker says of one picture."""

    number: str  # "2 of 4"
    nsfw: bool
    is_marked: bool
    nsfw_score: float
    watermark_score: float
    was_unsafe: bool
    was_marked: bool

    @property
    def is_judged(self) -> bool:
        return math.isfinite(self.nsfw_score) and math.isfinite(self.watermark_score)

    @property
    def is_unsafe(self) -> bool:
        return self.nsfw or self.was_unsafe or not self.is_judged

    def treatment(self, action: Action) -> Action:
        """What is done with this picture; one that nobody judged is never shown."""
        if not self.is_unsafe:
            return "flag"
        return action if self.is_judged or action == "raise" else "black"

    def text(self, action: Action) -> str:
        """In plain words: which picture, why, what was done, what to do. Empty if there is nothing new."""
        if not (findings := self._findings()):
            return ""
        advice = _ADVICE if self.is_judged else _REPAIR
        done = _DONE[self.treatment(action)]
        return f"Picture {self.number} {', and '.join(findings)}. {done} {advice if self.is_unsafe else _OTHER}"

    def _findings(self) -> list[str]:
        is_new = not self.was_unsafe
        if is_new and not self.is_judged:
            scores = f"{self.nsfw_score} (unsafe) and {self.watermark_score} (watermark)"
            return [f"could not be judged, since the safety checker's scores are {scores}"]
        found = []
        if is_new and self.nsfw:
            found.append(f"looks unsafe (score {self.nsfw_score:.2f}, threshold {THRESHOLD})")
        if self.is_marked and not self.was_marked:
            score = f"(score {self.watermark_score:.2f}, threshold {THRESHOLD})"
            found.append(f"looks as if it bore somebody's watermark {score}")
        return found


_DONE: dict[Action, str] = {
    "black": "It was made black.",
    "blur": "It was blurred.",
    "flag": "It was left as it is.",
    "raise": "It is not handed out.",
}
_ADVICE = "Try another prompt or seed; `safety` says what is done with such pictures: black, blur, flag or raise."
_REPAIR = "Run the safety checker in float32, or load its weights anew."
_OTHER = "Another seed may give one without."


def _tell(reports: list[_Report], action: Action) -> None:
    """One line in the log for each picture of which there is something to tell, or the error that was asked for."""
    if action == "raise" and any(report.is_unsafe for report in reports):
        raise SafetyError(
            " ".join(report.text(action) for report in reports if report.is_unsafe),
            nsfw_scores=[report.nsfw_score for report in reports],
            watermark_scores=[report.watermark_score for report in reports],
        )
    for text in filter(None, (report.text(action) for report in reports)):
        log.warning("%s", text)


def _treated(x_BCHW: Tensor, treatments: list[Action]) -> Tensor:
    if not any(treatment in _HIDES for treatment in treatments):
        return x_BCHW
    pairs = zip(treatments, x_BCHW.split(1), strict=True)
    return torch.cat([_HIDES[treatment](x) if treatment in _HIDES else x for treatment, x in pairs])


def blackened(x_BCHW: Tensor) -> Tensor:
    return torch.full_like(x_BCHW, -1.0)


def blurred(x_BCHW: Tensor) -> Tensor:
    """Beyond recognition: the mean colours of a few large fields, with soft borders between them."""
    fields = averaged(x_BCHW.detach().float().clamp(-1, 1), (BLUR_CELLS, BLUR_CELLS))
    return F.interpolate(fields, x_BCHW.shape[-2:], mode="bilinear", align_corners=False).to(x_BCHW)


_HIDES: dict[Action, Callable[[Tensor], Tensor]] = {"black": blackened, "blur": blurred}
