"""The parts of a cascade as fine-tuning needs them: never all of them in memory at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from floyd.apps.names import expanded
from floyd.models.unet import UNet2DConditionModel
from floyd.pipelines.cascade import Cascade
from floyd.pipelines.deepfloyd_if import IFPipeline, IFSuperResolutionPipeline
from floyd.store.fingerprint import fingerprint
from floyd.store.presets import STAGES, is_cascade, read_presets, stage_folders
from floyd.store.source import Source

BUILT_IN = "built-in"
_NO_TEXT: Mapping[str, Any] = {"tokenizer": None, "text_encoder": None}
_NO_SAFETY: Mapping[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "watermarker": None,
    "requires_safety_checker": False,
}


@dataclass(frozen=True)
class Models:
    """Where each stage lies, from the first on; the only one named may be a stage II."""

    sources: tuple[str | None, ...]
    stage: int
    dtype: torch.dtype
    variant: str | None = None
    presets: Mapping[str, Mapping[str, Any]] | None = None
    words: str | None = None  # a file of textual inversion that the text encoder is taught first

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        *,
        stage: int,
        dtype: torch.dtype,
        variant: str | None = None,
        words: str | None = None,
    ) -> Models:
        names = [str(files("floyd") / "mini") if name == BUILT_IN else name for name in expanded(names)]
        presets = None
        sources: tuple[str | None, ...] = tuple(names)
        if len(names) == 1 and is_cascade(names[0]):
            presets = read_presets(names[0])
            sources = tuple(str(folder) for folder in stage_folders(names[0]).values())
        elif len(names) == 1 and stage == 2:
            sources = (None, names[0])
        if len(sources) > len(STAGES):
            raise ValueError(f"model names one to {len(STAGES)} stages, got {len(sources)}.")
        if len(sources) < stage:
            raise ValueError(f"stage {stage} is to be trained, and model names {len(sources)} of the stages.")
        models = cls(sources, stage, dtype, variant, presets, words)
        takes = _unet(models.trained)["in_channels"]
        if takes != (wanted := 3 * stage):
            raise ValueError(
                f"{models.trained} is no stage {stage}: its network takes {takes} channels, and one of stage {stage} "
                f"{wanted}."
            )
        return models

    @property
    def trained(self) -> str:
        """Where the stage that is trained lies."""
        source = self.sources[self.stage - 1]
        assert source is not None, "of() has put it there"
        return source

    def reader(self) -> tuple[Any, Any]:
        """Tokenizer and text encoder: of stage I, or of the only one there is."""
        rest: dict[str, Any] = {"unet": None, "scheduler": None}
        pipe = IFPipeline.from_pretrained(self._text_source, **rest, **_NO_SAFETY, **self._files())
        if pipe.text_encoder is None:
            raise ValueError(f"{self._text_source} has no text encoder, which is to read the captions.")
        if self.words is not None:
            pipe.load_textual_inversion(self.words)
        return pipe.tokenizer, pipe.text_encoder

    def encoder_name(self) -> str:
        """What changes when the text encoder's states do."""
        source = self._text_source
        folder = Source(source).folder()
        parts = (
            [fingerprint(source)]
            if folder is None
            else [fingerprint(folder / n) for n in ("text_encoder", "tokenizer")]
        )
        taught = [] if self.words is None else [fingerprint(self.words)]
        return " ".join([*parts, *taught, str(self.dtype)])

    def pipeline(self, *, is_trained_whole: bool) -> IFPipeline | IFSuperResolutionPipeline:
        """The stage that is trained, without a text encoder; weights that are all trained are in float32."""
        kind = IFPipeline if self.stage == 1 else IFSuperResolutionPipeline
        options = self._files() | ({"torch_dtype": torch.float32} if is_trained_whole else {})
        return kind.from_pretrained(self.trained, **_NO_TEXT, **_NO_SAFETY, **options)

    def sides(self) -> list[int]:
        """What each stage paints. IF's enlarge four times, where nothing says otherwise."""
        first, *others = self.sources
        sides = [_side(self.trained) // 4 if first is None else _side(first)]
        if others:
            sides.append(_side(str(others[0])))
        return sides if len(others) < 2 else [*sides, 4 * sides[1]]

    def small_side(self) -> int:
        """Of the pictures that stage II enlarges: what stage I paints."""
        return self.sides()[0]

    def stages_for(self, size: int) -> int:
        """How many stages it takes to paint pictures of this size, the trained one among them."""
        sides = self.sides()
        allowed = sides[self.stage - 1 :]
        if size not in allowed:
            raise ValueError(
                f"validation_size must be one of {', '.join(map(str, allowed))}, which the stages from stage "
                f"{self.stage} on paint, got {size}."
            )
        num_stages = sides.index(size) + 1
        self._known(num_stages)
        return num_stages

    def cascade(self, num_stages: int) -> Cascade:
        """The first stages as they are, to paint with."""
        return Cascade.from_pretrained(*self._known(num_stages), presets=self.presets, **_NO_SAFETY, **self._files())

    def cascade_with(self, pipe: Any, num_stages: int) -> Cascade:
        """The first stages, with this one in its place; none of them reads text."""
        stages: list[Any] = []
        for number, source in enumerate(self._known(num_stages), start=1):
            if number == self.stage:
                stages.append(pipe)
            elif number == 1:
                stages.append(IFPipeline.from_pretrained(source, **_NO_TEXT, **_NO_SAFETY, **self._files()))
            elif number == 2:
                stages.append(
                    IFSuperResolutionPipeline.from_pretrained(source, **_NO_TEXT, **_NO_SAFETY, **self._files())
                )
            else:
                whole = Cascade.from_pretrained(*self._known(3), presets={}, **_NO_TEXT, **_NO_SAFETY, **self._files())
                stages.append(whole.stages["stage_3"])
        return Cascade(*stages, presets=self.presets)

    @property
    def _text_source(self) -> str:
        return self.sources[0] or self.trained

    def _known(self, num_stages: int) -> list[str]:
        sources = self.sources[:num_stages]
        if len(sources) < num_stages or None in sources:
            raise ValueError(
                f"Painting takes all stages up to {num_stages}, and model names {Path(self.trained).name} alone: name "
                "the stages before it, too, or ask for smaller pictures."
            )
        return [str(source) for source in sources]

    def _files(self) -> dict[str, Any]:
        return {"variant": self.variant, "torch_dtype": self.dtype}


def _side(source: str) -> int:
    return int(_unet(source)["sample_size"])


def _unet(source: str) -> dict[str, Any]:
    """The network's configuration."""
    return UNet2DConditionModel.load_config(source, subfolder="unet")
