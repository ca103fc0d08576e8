"""One training loop for every part of the cascade; what is trained is a loss that it is given.

A step's data and noise depend on (seed, step) alone, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floyd.store.snapshots import read_snapshot, write_snapshot
from floyd.training.ema import Ema


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to optimize. `phases` run one after the other; the learning rate is linear within each."""

    phases: tuple[Phase, ...]
    warmup_steps: int = 100
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
        self.optimizer = torch.optim.AdamW(
            _decayed_apart(model, config.weight_decay), lr=config.phases[0].rate, betas=config.betas, fused=True
        )
        self.step = 0
        self.seconds = 0.0
        if self._snapshot.exists():
            self._load(read_snapshot(self._snapshot))

    @property
    def _snapshot(self) -> Path:
        return self.folder / "state.pt"

    def run(self, *, until: int | None = None) -> Iterator[Progress]:
        """Trains up to step `until` (all by default), yielding after every step; snapshots as it goes."""
        last = min(until or self.config.num_steps, self.config.num_steps)
        saved = time.monotonic()
        while self.step < last:
            begin = time.monotonic()
            losses = self._one_step()
            self.step += 1
            self.seconds += time.monotonic() - begin
            if time.monotonic() - saved > self.config.snapshot_every_s or self.step == last:
                self.save()
                saved = time.monotonic()
            yield Progress(self.step - 1, self.config.num_steps, losses, self.seconds)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        write_snapshot(state, self._snapshot)

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _one_step(self) -> dict[str, float]:
        phase, rate = self.config.phase_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        with torch.autocast(device_of(self.model).type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            losses = self.loss_of(self.model, phase, self.step, generator)
        total = torch.stack(list(losses.values())).sum()
        if not math.isfinite(value := float(total.detach())):
            raise FloatingPointError(f"the loss is {value} at step {self.step}; lower the learning rate.")
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.ema.update(self.model)
        return {name: float(value.detach()) for name, value in losses.items()}


def _decayed_apart(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels are decayed; biases, norms and single vectors are not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
