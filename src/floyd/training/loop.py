"""One training loop for every part of the cascade; what is trained is a loss that it is given.

A step's data and noise depend on (seed, step) alone, so a run that was killed goes on as if it had not been, and a
batch may be computed in pieces, by several processes, or both (`workers.Share`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floyd.engines.learning import quicken
from floyd.errors import CheckpointError
from floyd.store.snapshots import read_snapshot, write_snapshot
from floyd.store.weights import some
from floyd.training.ema import Ema
from floyd.training.muon import Muon
from floyd.training.precision import PRECISIONS, chosen
from floyd.training.workers import ALONE, WHOLE, Workers

OPTIMIZERS = ("adamw", "adamw8bit", "muon")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to optimize. `phases` run one after the other; the learning rate is linear within each."""

    phases: tuple[Phase, ...]
    warmup_steps: int = 100
    optimizer: str = "adamw"  # "muon": Muon for matrices and kernels between the ends of a UNet, AdamW for all else
    accumulate: int = 1  # in how many pieces a batch is computed, one after the other
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "auto"  # of the forward pass (autocast); weights and optimizer are float32
    snapshot_every_s: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}.")
        if not self.phases:
            raise ValueError("phases must not be empty: a run needs at least one.")

    @property
    def num_steps(self) -> int:
        return sum(phase.num_steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[Phase, float]:
        """The phase that the step belongs to, and its learning rate."""
        begin = 0
        for phase in self.phases:
            if step < begin + phase.num_steps:
                share = (step - begin) / phase.num_steps
                rate = phase.rate + share * (phase.last_rate - phase.rate)
                return phase, rate * min(1.0, (step + 1) / max(self.warmup_steps, 1))
            begin += phase.num_steps
        raise ValueError(f"step {step} is past the end of the run ({self.num_steps} steps).")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one batch size and one size of picture."""

    num_steps: int
    batch_size: int
    size: int
    rate: float
    last_rate: float


@dataclass(frozen=True)
class Progress:
    """One step that was made."""

    step: int
    num_steps: int
    losses: dict[str, float]
    seconds: float  # spent in this run so far

    @property
    def seconds_left(self) -> float:
        return self.seconds / max(self.step + 1, 1) * (self.num_steps - self.step - 1)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


Losses = dict[str, Tensor]
LossOf = Callable[..., Losses]  # (model, phase, step, generator), and share=... if a batch can be cut


class Trainer:
    """Trains `model` on `loss_of(model, phase, step, generator)`, the sum of whose entries is minimized.

    Where a batch is cut, `loss_of` is also told `share`: it draws for the whole batch, computes the share's rows, and
    its means over those are such that their mean over all shares is the mean over the batch.
    """

    def __init__(
        self, model: nn.Module, loss_of: LossOf, config: LoopConfig, folder: Path, *, workers: Workers = ALONE
    ) -> None:
        self.model, self.loss_of, self.config, self.folder, self.workers = model, loss_of, config, folder, workers
        self._check_cut()
        self.precision = chosen(config.precision, device_of(model))
        if device_of(model).type == "cpu":
            quicken(model)
        self.ema = Ema(model, config.ema_decay)
        self.optimizers = _optimizers(model, config)
        self.step = 0
        self.seconds = 0.0
        if self._snapshot.exists():
            self._load(read_snapshot(self._snapshot))
        self._network = workers.prepared(model)

    def _check_cut(self) -> None:
        pieces = self.config.accumulate * self.workers.share.count
        if uneven := [phase.batch_size for phase in self.config.phases if phase.batch_size % pieces]:
            raise ValueError(
                f"a batch of {uneven[0]} cannot be cut into {pieces} equal pieces (accumulate x processes): choose a "
                "multiple."
            )

    @property
    def _snapshot(self) -> Path:
        return self.folder / "state.pt"

    def run(self, *, until: int | None = None) -> Generator[Progress, None, None]:
        """Trains up to step `until` (all by default), yielding after every step.

        Snapshots as it goes, at the end, and when the iterator is closed: nothing is lost by leaving between steps.
        """
        last = self.config.num_steps if until is None else min(until, self.config.num_steps)
        saved = time.monotonic()
        while self.step < last:
            begin = time.monotonic()
            losses = self._one_step()
            self.step += 1
            self.seconds += time.monotonic() - begin
            is_due = time.monotonic() - saved > self.config.snapshot_every_s or self.step == last
            if is_due:
                self.save()
                saved = time.monotonic()
            try:
                yield Progress(self.step - 1, self.config.num_steps, losses, self.seconds)
            except GeneratorExit:
                if not is_due:
                    self.save()
                raise

    def save(self) -> None:
        """By the main process: all of them are in the same state."""
        if not self.workers.is_main:
            return
        state = {
            "model": _trained_state(self.model),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        write_snapshot(state, self._snapshot)

    def _load(self, state: dict[str, Any]) -> None:
        own = _trained_state(self.model)
        if own.keys() != state["model"].keys():
            raise CheckpointError(
                f"{self._snapshot} is of another network: it holds {some(state['model'].keys() ^ own.keys())}, or "
                "lacks it. Choose another folder."
            )
        self.model.load_state_dict(state["model"], strict=False)
        self.ema.load_state_dict(state["ema"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
            _lay_out(optimizer)
        self.step, self.seconds = state["step"], state["seconds"]

    def _one_step(self) -> dict[str, float]:
        phase, rate = self.config.phase_at(self.step)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        self.model.zero_grad(set_to_none=True)
        losses = self.workers.mean(self._backward(phase))
        if not math.isfinite(value := sum(losses.values())):
            raise FloatingPointError(f"the loss is {value} at step {self.step}; lower the learning rate.")
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update(self.model)
        return losses

    def _backward(self, phase: Phase) -> dict[str, float]:
        """The gradients of this process's share of the batch, piece by piece, and the mean losses of the pieces."""
        pieces = self.config.accumulate
        told: dict[str, float] = {}
        for piece in range(pieces):
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
            share = self.workers.share.within(piece, pieces)
            cut = {} if share == WHOLE else {"share": share}
            with self.workers.apart(self._network) if piece < pieces - 1 else nullcontext():
                with torch.autocast(device_of(self.model).type, torch.bfloat16, enabled=self.precision == "bf16"):
                    losses = self.loss_of(self._network, phase, self.step, generator, **cut)
                total = torch.stack(list(losses.values())).sum()
                (total / pieces).backward()
            for name, value in losses.items():
                told[name] = told.get(name, 0.0) + float(value.detach()) / pieces
        return told


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """What it remembers of a weight lies in memory as the weight does, which fused kernels take for granted."""
    for parameter, state in optimizer.state.items():
        for name, own in state.items():
            if isinstance(own, Tensor) and own.shape == parameter.shape and own.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=own.dtype).copy_(own)


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    """All but what is frozen, which the run finds where it found it before."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    orthogonal = [p for name, p in trained.items() if config.optimizer == "muon" and _is_hidden(name, p)]
    rest = [p for p in trained.values() if all(p is not other for other in orthogonal)]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},  # biases, norms
    ]
    kind, options = (_eight_bits(), {}) if config.optimizer == "adamw8bit" else (torch.optim.AdamW, {"fused": True})
    adamw = kind(groups, lr=config.phases[0].rate, betas=config.betas, **options)
    if not orthogonal:
        return [adamw]
    return [adamw, Muon(orthogonal, lr=config.phases[0].rate, weight_decay=config.weight_decay)]


def _eight_bits() -> Any:
    """AdamW whose moments take a byte each (arXiv:2110.02861)."""
    try:
        return import_module("bitsandbytes.optim").AdamW8bit
    except ModuleNotFoundError as error:
        raise ImportError(
            "optimizer adamw8bit needs bitsandbytes, which is not installed: pip install 'floyd-if[8bit]', or take "
            "adamw."
        ) from error


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels between the first and the last layer; tables of embeddings are neither."""
    is_end = any(part in ("conv_in", "conv_out", "class_embedding", "embeddings") for part in name.split("."))
    return parameter.ndim > 1 and not is_end
