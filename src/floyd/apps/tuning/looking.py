"""What is seen of a run on its way: pictures of the validation prompts, painted by the whole cascade, and curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from floyd.apps.evaluate import CascadePainter
from floyd.apps.tuning.models import Models
from floyd.store.files import made
from floyd.text.cleaning import preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

    from floyd.pipelines.cascade import Cascade

ReadPrompts = Callable[[Sequence[str]], Tensor]  # [B, L, E]


@dataclass(frozen=True)
class _Asked:
    prompt: str
    seed: int


class _Painter(CascadePainter):
    """A cascade whose prompts are read elsewhere; stage III reads its own."""

    def __init__(self, cascade: Cascade, read: ReadPrompts) -> None:
        super().__init__(cascade)
        self._read = read

    def _text(self, stage: Any, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        if hasattr(stage, "vae"):
            return super()._text(stage, texts)
        return self._read(texts), self._read([""] * len(texts))


@dataclass(frozen=True, eq=False)
class Validation:
    """Prompts that are painted again and again, from the same noise; what changes is what was learned."""

    models: Models
    pipe: Any  # of the trained stage, with the network as it is trained
    prompts: tuple[str, ...]
    size: int
    seed: int
    read: ReadPrompts

    @torch.no_grad()
    def paint(self) -> list[Image]:
        """A picture for each prompt. The other stages are loaded for it, and let go."""
        painter = _Painter(
            self.models.cascade_with(self.pipe, self.models.stages_for(self.size)).to(self.pipe.device), self.read
        )
        asked: list[Any] = [_Asked(prompt, self.seed + i) for i, prompt in enumerate(self.prompts)]
        drawn = painter.draw(asked)
        for size in painter.sizes[1:]:
            drawn = painter.enlarge(asked, drawn, size)
        from floyd.images.convert import numpy_to_pil

        return numpy_to_pil(np.stack([each.picture for each in drawn]))


def cleaned(prompts: Sequence[str], *, clean_caption: bool) -> tuple[str, ...]:
    return tuple(preprocess(list(prompts), clean_caption=clean_caption))


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """In evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def save_pictures(pictures: Sequence[Image], folder: Path, step: int) -> list[Path]:
    paths = [made(folder) / f"step-{step:06}-{i}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths


class Board:
    """Curves and pictures for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            writer = import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tensorboard = true needs tensorboard, which is not installed: pip install 'floyd-if[train]'"
            ) from error
        self._writer = writer(str(folder))

    def losses(self, step: int, losses: Mapping[str, float]) -> None:
        for name, value in losses.items():
            self._writer.add_scalar(f"loss/{name}", value, step)

    def pictures(self, step: int, pictures: Sequence[Image]) -> None:
        for i, picture in enumerate(pictures):
            self._writer.add_image(f"validation/{i}", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
