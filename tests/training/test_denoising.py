"""S images of a share  C channels  H height  W width  L text tokens  E encoder width"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from floyd.diffusion.conditioning import enlarged
from floyd.diffusion.schedule import NoiseSchedule
from floyd.training.data.pictures import Pictures, Window, indices_at
from floyd.training.denoising import Batches, Denoising, Enlarging, Kept, Weighing
from floyd.training.loop import Phase
from floyd.training.workers import Share

SCHEDULE = NoiseSchedule.cosine()
PHASE = Phase(num_steps=1, batch_size=6, size=16, rate=1e-3, last_rate=1e-3)


def folder_of(root: Path, count: int, word: str) -> Pictures:
    root.mkdir()
    rng = np.random.default_rng(len(word))
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"{word} {i}")
    return Pictures.of(root)


class Spy(nn.Module):
    """A network that remembers what it was shown."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, channels, 1, 1), 0.3))
        self.seen: dict[str, Any] = {}

    def forward(self, x_SCHW: Tensor, t_S: Tensor, text_SLE: Tensor, **told: Any) -> tuple[Tensor]:
        self.seen = {"x": x_SCHW, "t": t_S, "text": text_SLE, **told}
        return (x_SCHW[:, :3].repeat(1, 2, 1, 1)[:, : self.weight.shape[1]] * self.weight,)


def read(captions: Sequence[str], device: torch.device) -> Tensor:
    return torch.tensor([[[float(len(caption))]] for caption in captions])


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    return Batches(pictures=folder_of(tmp_path / "own", 5, "zorp"), crop="random", flip=True, seed=2)


def losses_of(loss: Denoising, model: nn.Module, share: Share | None = None) -> dict[str, Tensor]:
    cut = {} if share is None else {"share": share}
    return loss(model, PHASE, 3, torch.Generator().manual_seed(7), **cut)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("kind", ["stage_1", "stage_2", "kept"])
def test_the_shares_of_a_batch_add_up_to_the_whole(kind: str, count: int, batches: Batches, tmp_path: Path) -> None:
    enlarging = None
    if kind == "stage_2":
        batches, enlarging = replace(batches, small_side=4), Enlarging(schedule=SCHEDULE, small_side=4)
    if kind == "kept":
        batches = replace(batches, kept=Kept(pictures=folder_of(tmp_path / "kept", 3, "cat"), weight=0.7))
    loss = Denoising(schedule=SCHEDULE, batches=batches, read=read, enlarging=enlarging)
    model = Spy()
    whole = losses_of(loss, model)
    shares = [losses_of(loss, model, Share(i, count)) for i in range(count)]
    assert set(whole) == ({"noise", "variance"} | ({"noise_kept", "variance_kept"} if kind == "kept" else set()))
    for name, value in whole.items():
        mean = torch.stack([share[name] for share in shares]).mean()
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-7)


def test_stage_two_is_shown_the_small_picture_as_its_pipeline_shows_it(batches: Batches) -> None:
    """At noise level 0 the condition is the enlarged picture itself, and it is never the noisy large one."""
    loss = Denoising(
        schedule=SCHEDULE,
        batches=replace(batches, small_side=4, crop="center", flip=False, caption_dropout=0.0),
        read=read,
        enlarging=Enlarging(schedule=SCHEDULE, small_side=4, max_level=1),
    )
    model = Spy()
    losses_of(loss, model)
    own = indices_at(3, 6, 5, seed=2)
    small = batches.pictures.batch(own, 4, [Window()] * 6)
    torch.testing.assert_close(model.seen["x"][:, 3:], enlarged(small, (16, 16)), atol=0.05, rtol=0)
    assert model.seen["class_labels"].tolist() == [0] * 6
    assert (model.seen["x"][:, :3] - model.seen["x"][:, 3:]).abs().mean() > 0.3


def test_stage_two_is_told_the_level_that_its_small_picture_was_noised_to(batches: Batches) -> None:
    enlarging = Enlarging(schedule=SCHEDULE, small_side=4, max_level=1000)
    loss = Denoising(schedule=SCHEDULE, batches=replace(batches, small_side=4), read=read, enlarging=enlarging)
    model, levels, spreads = Spy(), [], []
    for step in range(30):
        loss(model, PHASE, step, torch.Generator().manual_seed(step))
        levels += model.seen["class_labels"].tolist()
        spreads += (model.seen["x"][:, 3:, 1:] - model.seen["x"][:, 3:, :-1]).std((1, 2, 3)).tolist()
    assert len(set(levels)) > 100
    assert np.corrcoef(levels, spreads)[0, 1] > 0.9
    assert model.seen["t"].tolist() != model.seen["class_labels"].tolist()


def test_the_share_of_captions_left_out_is_as_told(batches: Batches) -> None:
    def silent(dropout: float) -> int:
        own = replace(batches, caption_dropout=dropout)
        drawn = (own.at(PHASE, step, Share(), torch.Generator().manual_seed(step)) for step in range(50))
        return sum(caption == "" for batch in drawn for caption in batch.captions)

    assert silent(0.0) == 0
    assert silent(1.0) == 300
    assert 20 < silent(0.1) < 42


def test_kept_pictures_are_every_other_one_and_weigh_as_told(batches: Batches, tmp_path: Path) -> None:
    kept = Kept(pictures=folder_of(tmp_path / "kept", 3, "cat"), weight=0.5)
    batch = replace(batches, kept=kept, caption_dropout=0.0).at(PHASE, 0, Share(), torch.Generator())
    assert [caption.split()[0] for caption in batch.captions] == ["zorp", "cat"] * 3
    assert batch.is_kept_S.tolist() == [False, True] * 3
    light, heavy = (
        losses_of(
            Denoising(schedule=SCHEDULE, batches=replace(batches, kept=replace(kept, weight=w)), read=read), Spy()
        )
        for w in (0.5, 1.0)
    )
    assert heavy["noise_kept"].item() == pytest.approx(2 * light["noise_kept"].item())
    assert heavy["noise"].item() == light["noise"].item()


def test_the_captions_of_kept_pictures_are_left_out_by_a_share_of_their_own(batches: Batches, tmp_path: Path) -> None:
    kept = Kept(pictures=folder_of(tmp_path / "kept", 3, "cat"), caption_dropout=1.0)
    batch = replace(batches, kept=kept, caption_dropout=0.0).at(PHASE, 0, Share(), torch.Generator())
    assert [not caption for caption in batch.captions] == batch.is_kept_S.tolist()
    as_the_others = replace(batches, kept=replace(kept, caption_dropout=None), caption_dropout=1.0)
    assert not any(as_the_others.at(PHASE, 0, Share(), torch.Generator()).captions)


def test_kept_pictures_may_be_held_to_what_the_network_said_before(batches: Batches, tmp_path: Path) -> None:
    kept = Kept(pictures=folder_of(tmp_path / "kept", 3, "cat"))
    shown: list[Tensor] = []

    @contextmanager
    def before(model: nn.Module) -> Iterator[nn.Module]:
        yield lambda x_SCHW, *_, **__: (shown.append(x_SCHW) or torch.full((len(x_SCHW), 6, 16, 16), 0.25),)

    loss = Denoising(schedule=SCHEDULE, batches=replace(batches, kept=kept), read=read)
    plain, model = losses_of(loss, Spy()), Spy()
    held = losses_of(replace(loss, before=before), model)
    assert torch.equal(shown[0], model.seen["x"][1::2])  # the kept ones alone
    assert held["noise"] == plain["noise"]
    assert held["variance_kept"] == plain["variance_kept"]  # of which the network knows what it is told
    weight_T = loss.weighing.weights(SCHEDULE)
    said_SCHW = model.weight.detach()[:, :3] * model.seen["x"]
    error_S = (said_SCHW - 0.25).square().flatten(1).mean(1) * weight_T[model.seen["t"]]
    torch.testing.assert_close(held["noise_kept"].detach(), error_S[1::2].mean())


def test_a_network_without_a_variance_of_its_own_learns_the_noise_alone(batches: Batches) -> None:
    losses = losses_of(Denoising(schedule=SCHEDULE, batches=batches, read=read), Spy(channels=3))
    assert set(losses) == {"noise"}


def test_min_snr_weights_fall_where_the_picture_is_clean_and_the_floor_lifts_the_noisy_end() -> None:
    plain, lifted = Weighing().weights(SCHEDULE), Weighing(snr_floor=1.0).weights(SCHEDULE)
    assert float(plain[0]) < 0.01
    assert float(plain[-1]) == pytest.approx(1.0)
    assert float(lifted[-1]) > 10
    assert torch.equal(plain[:400], lifted[:400])


def test_a_noise_level_that_the_schedule_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_noise_level must be in \[1, 1000\], got 1001"):
        Enlarging(schedule=SCHEDULE, max_level=1001)
