"""Who computes a step: one process, or several that share every batch.

A batch is cut into shares, one for each process and piece; what the step learns does not depend on the cut but for the
rounding of sums. accelerate starts the processes (`accelerate launch`, torchrun) and carries the gradients.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Share:
    """Every `count`-th row of a batch, from row `index` on: rows of two kinds that alternate are in every other one."""

    index: int = 0
    count: int = 1

    @property
    def rows(self) -> slice:
        return slice(self.index, None, self.count)

    def within(self, piece: int, pieces: int) -> Share:
        """A piece of this share."""
        return Share(self.index + self.count * piece, self.count * pieces)


WHOLE = Share()


class Workers(Protocol):
    """The processes of a run."""

    @property
    def share(self) -> Share:
        """Which part of every batch is this process's."""

    @property
    def is_main(self) -> bool:
        """The one that writes files and talks."""

    @property
    def device(self) -> torch.device | None:
        """Where this process computes, if that is settled by who started it."""

    def prepared(self, model: nn.Module) -> nn.Module:
        """The model, carrying its gradients to the others in every backward pass."""

    def apart(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Backward passes within keep their gradients to themselves, for the next one to carry."""

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Over all processes."""

    def wait(self) -> None:
        """For all others to come here."""


class Alone:
    """One process."""

    share = WHOLE
    is_main = True
    device: torch.device | None = None

    def prepared(self, model: nn.Module) -> nn.Module:
        return model

    def apart(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(values)

    def wait(self) -> None:
        """There is nobody to wait for."""


ALONE: Workers = Alone()


class Together:
    """The processes that accelerate or torchrun started."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    @property
    def share(self) -> Share:
        return Share(self._accelerator.process_index, self._accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self._accelerator.is_main_process)

    @property
    def device(self) -> torch.device | None:
        return self._accelerator.device

    def prepared(self, model: nn.Module) -> nn.Module:
        prepared: nn.Module = self._accelerator.prepare_model(model)
        return prepared

    def apart(self, model: nn.Module) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._accelerator.no_sync(model)
        return context

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        own = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, self._accelerator.reduce(own, reduction="mean").tolist(), strict=True))

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def launched(*, on_cpu: bool = False) -> Workers:
    """All processes of the launch that this one is of; itself alone where nobody launched it."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    try:
        accelerate: Any = import_module("accelerate")
    except ModuleNotFoundError as error:
        raise ImportError(
            "Training in several processes needs accelerate, which is not installed: pip install 'floyd-if[train]'"
        ) from error
    return Together(accelerate.Accelerator(cpu=on_cpu))


@contextmanager
def main_first(workers: Workers) -> Iterator[None]:
    """What is within is done by the main process, and then by the others, who find its files."""
    if not workers.is_main:
        workers.wait()
    yield
    if workers.is_main:
        workers.wait()
