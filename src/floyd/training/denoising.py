"""What a stage of IF is fine-tuned on: the loss it was published with, the learned variance included.

Stage II sees what its pipeline shows it: the small picture enlarged and noised to a level of its own, which it is told.

B images of the whole batch  S images of a share of it  C channels  H height  W width  L text tokens  E encoder width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from floyd.diffusion.conditioning import enlarged
from floyd.diffusion.losses import hybrid_loss, layout_density, snr_weights, stratified_timesteps
from floyd.diffusion.schedule import NoiseSchedule
from floyd.training.data.pictures import Pictures, Window, indices_at, windows_for
from floyd.training.loop import Losses, Phase, device_of
from floyd.training.workers import WHOLE, Share


class ReadText(Protocol):
    """What a batch's captions are to the network."""

    def __call__(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """[S, L, E]"""


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """Which timesteps count how much."""

    snr_gamma: float = 5.0
    snr_floor: float = 0.0
    noisy_share: float = 0.0  # of the draws that are uniform in log SNR instead of in t

    def weights(self, schedule: NoiseSchedule) -> Tensor:
        return snr_weights(schedule, low=self.snr_floor, high=self.snr_gamma)

    def density(self, schedule: NoiseSchedule) -> Tensor:
        return layout_density(schedule, share=self.noisy_share)


@dataclass(frozen=True, kw_only=True)
class Enlarging:
    """How stage II is shown a small picture."""

    schedule: NoiseSchedule  # of the noise on it
    small_side: int = 64
    max_level: int = 400

    def __post_init__(self) -> None:
        if not 1 <= self.max_level <= len(self.schedule):
            raise ValueError(f"max_noise_level must be in [1, {len(self.schedule)}], got {self.max_level}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Pictures of what must not be forgotten, every other one of a batch (DreamBooth, arXiv:2208.12242, eq. 2)."""

    pictures: Pictures
    weight: float = 1.0
    caption_dropout: float | None = None  # of these; that of the other pictures unless told


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Which pictures a step sees, and how."""

    pictures: Pictures
    crop: str = "center"
    flip: bool = False
    caption_dropout: float = 0.1
    kept: Kept | None = None
    seed: int = 0
    small_side: int | None = None  # of the same pictures, for stage II

    def at(self, phase: Phase, step: int, share: Share, generator: torch.Generator) -> Batch:
        """The share's part of a batch; what is drawn is drawn for all of it."""
        size = phase.batch_size
        windows = windows_for(size, self.crop, self.flip, generator)
        is_silent_B = torch.rand(size, generator=generator) < self._dropout(size)
        rows = range(size)[share.rows]
        sources = self._sources(step, size)
        chosen = [(*sources[row], windows[row]) for row in rows]
        captions = [
            "" if is_silent_B[row] else pictures.captions[index]
            for row, (pictures, index, _) in zip(rows, chosen, strict=True)
        ]
        small = None if self.small_side is None else _stacked(chosen, self.small_side)
        return Batch(_stacked(chosen, phase.size), captions, self._is_kept(size)[share.rows], small)

    def _is_kept(self, size: int) -> Tensor:
        """[B]: every other row, if anything is to be kept."""
        return (torch.arange(size) % 2 == 1) & (self.kept is not None)

    def _dropout(self, size: int) -> Tensor:
        """[B]: of each row, the share of captions left out."""
        dropout_B = torch.full((size,), self.caption_dropout)
        if self.kept is not None and self.kept.caption_dropout is not None:
            dropout_B[self._is_kept(size)] = self.kept.caption_dropout
        return dropout_B

    def _sources(self, step: int, size: int) -> list[tuple[Pictures, int]]:
        """Of each row of the batch, from which pictures which one."""
        is_kept_B = self._is_kept(size).tolist()
        own = iter(indices_at(step, is_kept_B.count(False), len(self.pictures), self.seed))
        if self.kept is None:
            return [(self.pictures, index) for index in own]
        kept = iter(indices_at(step, is_kept_B.count(True), len(self.kept.pictures), self.seed + 1))
        return [(self.kept.pictures, next(kept)) if is_kept else (self.pictures, next(own)) for is_kept in is_kept_B]


def _stacked(chosen: Sequence[tuple[Pictures, int, Window]], side: int) -> Tensor:
    return torch.cat([pictures.batch([index], side, [window]) for pictures, index, window in chosen])


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures in [-1, 1] and what is said of them."""

    clean_SCHW: Tensor
    captions: Sequence[str]
    is_kept_S: Tensor
    small_SChw: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoising:
    """The hybrid loss (arXiv:2102.09672, eq. 16) of a stage, for `Trainer`."""

    schedule: NoiseSchedule
    batches: Batches
    read: ReadText
    enlarging: Enlarging | None = None
    weighing: Weighing = field(default_factory=Weighing)
    dtype: torch.dtype = torch.float32  # that the network's own weights are in
    before: Callable[[nn.Module], AbstractContextManager[nn.Module]] | None = None  # the network as it was

    def __call__(
        self, model: nn.Module, phase: Phase, step: int, generator: torch.Generator, *, share: Share = WHOLE
    ) -> Losses:
        device, size = device_of(model), phase.batch_size
        batch = self.batches.at(phase, step, share, generator)
        clean_SCHW = batch.clean_SCHW.to(device)
        t_S = stratified_timesteps(self.weighing.density(self.schedule), size, generator)[share.rows].to(device)
        noise_SCHW = _drawn(clean_SCHW, size, generator)[share.rows].to(device)

        told: dict[str, Any] = {}
        x_SCHW = self.schedule.noised(clean_SCHW, noise_SCHW, t_S)
        if self.enlarging is not None:
            low_SCHW, level_S = self._low(batch, phase, share, generator)
            x_SCHW = torch.cat([x_SCHW, low_SCHW.to(device)], dim=1)
            told["class_labels"] = level_S.to(device)
        text_SLE = self.read(batch.captions, device)
        seen = (x_SCHW.to(self.dtype), t_S, text_SLE.to(self.dtype))
        wanted_SCHW = self._wanted(model, seen, told, noise_SCHW, batch.is_kept_S)
        out_SCHW = model(*seen, **told, return_dict=False)[0]
        weight_T = self.weighing.weights(self.schedule)
        if out_SCHW.shape[1] == clean_SCHW.shape[1]:  # a network without a variance of its own
            error_S = (out_SCHW.float() - wanted_SCHW).square().flatten(1).mean(1)
            parts = {"noise": weight_T.to(device)[t_S] * error_S}
        else:
            simple_S, bound_S = hybrid_loss(
                out_SCHW, clean_SCHW, noise_SCHW, t_S, self.schedule, weight_T, wanted_BCHW=wanted_SCHW
            )
            parts = {"noise": simple_S, "variance": bound_S}
        return self._means(parts, batch.is_kept_S.to(device), size, share)

    def _wanted(
        self, model: nn.Module, seen: tuple[Tensor, ...], told: dict[str, Tensor], noise_SCHW: Tensor, is_kept_S: Tensor
    ) -> Tensor:
        """The noise; or of pictures to be kept, what the network said of it before it was trained."""
        rows_K = is_kept_S.nonzero()[:, 0]  # on the CPU still: a GPU would be waited for
        if self.before is None or not len(rows_K):
            return noise_SCHW
        rows_K = rows_K.to(noise_SCHW.device)
        with torch.no_grad(), self.before(model) as network:
            kept = {name: value_S[rows_K] for name, value_S in told.items()}
            before_KCHW = network(*(part_S[rows_K] for part_S in seen), **kept, return_dict=False)[0]
        return noise_SCHW.index_copy(0, rows_K, before_KCHW[:, : noise_SCHW.shape[1]].float())

    def _low(self, batch: Batch, phase: Phase, share: Share, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The small pictures as the network sees them, and their noise levels."""
        assert self.enlarging is not None
        assert batch.small_SChw is not None
        level_S = torch.randint(0, self.enlarging.max_level, (phase.batch_size,), generator=generator)[share.rows]
        low_SCHW = enlarged(batch.small_SChw, (phase.size, phase.size))
        noise_SCHW = _drawn(low_SCHW, phase.batch_size, generator)[share.rows]
        return self.enlarging.schedule.noised(low_SCHW, noise_SCHW, level_S), level_S

    def _means(self, parts: Losses, is_kept_S: Tensor, size: int, share: Share) -> Losses:
        """Over the share, of the rows of each kind by themselves."""
        if self.batches.kept is None:
            return {name: loss_S.mean() for name, loss_S in parts.items()}
        num_kept = size // 2
        losses: Losses = {}
        for name, loss_S in parts.items():
            own = torch.where(is_kept_S, 0.0, loss_S).sum() * share.count / (size - num_kept)
            kept = torch.where(is_kept_S, loss_S, 0.0).sum() * share.count / num_kept
            losses |= {name: own, f"{name}_kept": self.batches.kept.weight * kept}
        return losses


def _drawn(like_SCHW: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Noise for the whole batch, on the CPU: the same on every machine and however the batch is cut."""
    return torch.randn(size, *like_SCHW.shape[1:], generator=generator)


LookUp = Callable[[Sequence[str]], Tensor]


def known(look_up: LookUp) -> ReadText:
    """Texts whose embeddings are known already."""

    def read(captions: Sequence[str], device: torch.device) -> Tensor:
        return look_up(captions).to(device)

    return read
