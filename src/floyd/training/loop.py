"""One training loop for every part of the cascade; what is trained is a loss that it is given.

A step's data and noise depend on (seed, step) alone, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floyd.store.snapshots import read_snapshot, write_snapshot
from floyd.training.ema import Ema
from floyd.training.muon import Muon


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to optimize. `phases` run one after the other; the learning rate is linear within each."""

    phases: tuple[Phase, ...]
    warmup_steps: int = 100
    optimizer: str = "adamw"  # "muon": Muon for matrices and kernels between the ends of a UNet, AdamW for all else
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "bf16"  # of the forward pass (autocast); weights and optimizer are float32
    snapshot_every_s: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be 'bf16' or 'fp32', got {self.precision!r}.")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon', got {self.optimizer!r}.")
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
LossOf = Callable[[nn.Module, Phase, int, torch.Generator], Losses]


class Trainer:
    """Trains `model` on `loss_of(model, phase, step, generator)`, the sum of whose entries is minimized."""

    def __init__(self, model: nn.Module, loss_of: LossOf, config: LoopConfig, folder: Path) -> None:
        self.model, self.loss_of, self.config, self.folder = model, loss_of, config, folder
        self.ema = Ema(model, config.ema_decay)
        self.optimizers = _optimizers(model, config)
        self.step = 0
        self.seconds = 0.0
        if self._snapshot.exists():
            self._load(read_snapshot(self._snapshot))

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
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        write_snapshot(state, self._snapshot)

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.step, self.seconds = state["step"], state["seconds"]

    def _one_step(self) -> dict[str, float]:
        phase, rate = self.config.phase_at(self.step)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        with torch.autocast(device_of(self.model).type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            losses = self.loss_of(self.model, phase, self.step, generator)
        total = torch.stack(list(losses.values())).sum()
        if not math.isfinite(value := float(total.detach())):
            raise FloatingPointError(f"the loss is {value} at step {self.step}; lower the learning rate.")
        self.model.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update(self.model)
        return {name: float(value.detach()) for name, value in losses.items()}


def _optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    orthogonal = [p for name, p in trained.items() if config.optimizer == "muon" and _is_hidden(name, p)]
    rest = [p for p in trained.values() if all(p is not other for other in orthogonal)]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},  # biases, norms
        ],
        lr=config.phases[0].rate,
        betas=config.betas,
        fused=True,
    )
    if not orthogonal:
        return [adamw]
    return [adamw, Muon(orthogonal, lr=config.phases[0].rate, weight_decay=config.weight_decay)]


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels between the first and the last layer; tables of embeddings are neither."""
    is_end = any(part in ("conv_in", "conv_out", "class_embedding", "embeddings") for part in name.split("."))
    return parameter.ndim > 1 and not is_end
