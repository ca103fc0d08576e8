"""How bytes get from main memory to a device: at once, or on a stream of their own beside the computing."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
from torch import Tensor

from floyd.runtime.clock import part

log = logging.getLogger(__name__)


class Transfers(Protocol):
    """What a ring asks of a device. A ticket stands for a moment in the device's work, and None for the past."""

    def arena(self, num_bytes: int) -> Tensor:
        """Main memory that copies leave from, uint8."""

    def buffer(self, num_bytes: int) -> Tensor:
        """Memory of the device, uint8."""

    def copy(self, into: Tensor, host: Tensor, *, after: Any) -> Any:
        """Begin a copy that waits for `after`; the ticket of its end."""

    def wait(self, ticket: Any) -> None:
        """What is computed from now on waits for the ticket."""

    def mark(self) -> Any:
        """A ticket for the end of what is to be computed up to now."""


class PlainTransfers:
    """Each copy is done when it is asked for: for devices without streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def arena(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def copy(self, into: Tensor, host: Tensor, *, after: Any) -> Any:
        with part("transfers", count=0):
            into.copy_(host)
        return None

    def wait(self, ticket: Any) -> None:
        pass

    def mark(self) -> Any:
        return None


class CudaTransfers:
    """Copies run on a stream of their own, from pages that the system may not move. Streams wait for each other by
    events; the program waits for none."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._pins = True

    def arena(self, num_bytes: int) -> Tensor:
        if self._pins:
            try:
                return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:  # the system pins only so much
                log.info("No more memory can be pinned (%s): the rest of the weights is copied more slowly.", error)
                self._pins = False
        return torch.empty(num_bytes, dtype=torch.uint8)

    def buffer(self, num_bytes: int) -> Tensor:
        made = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self.stream.wait_event(self.mark())  # the allocator may have given what is still computed with
        return made

    def copy(self, into: Tensor, host: Tensor, *, after: Any) -> Any:
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            into.copy_(host, non_blocking=True)
            return self.stream.record_event()

    def wait(self, ticket: Any) -> None:
        if ticket is not None:
            torch.cuda.current_stream(self.device).wait_event(ticket)

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()


def transfers_to(device: torch.device) -> Transfers:
    return CudaTransfers(device) if device.type == "cuda" else PlainTransfers(device)


class CountingTransfers(PlainTransfers):
    """A device that counts bytes, for machines without one. A copy happens as late as it may: when it is waited for, or
    when another follows it. Whoever forgets to wait computes with what was there before."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(device or torch.device("cpu"))
        self.now_bytes = self.peak_bytes = self.copied_bytes = 0
        self.num_marks = 0
        self.copies: list[tuple[int, int | None]] = []  # bytes, and the mark that the copy waited for
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def buffer(self, num_bytes: int) -> Tensor:
        made = super().buffer(num_bytes).fill_(255)  # in every float dtype not a number
        self.now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        return made

    def copy(self, into: Tensor, host: Tensor, *, after: Any) -> Any:
        self.copied_bytes += host.nbytes
        self.copies.append((host.nbytes, after))
        number = len(self.copies)
        self._pending.append((number, into, host))
        return number

    def wait(self, ticket: Any) -> None:
        while ticket is not None and self._pending and self._pending[0][0] <= ticket:
            _, into, host = self._pending.pop(0)
            into.copy_(host)

    def mark(self) -> int:
        self.num_marks += 1
        return self.num_marks

    def released(self) -> None:
        """All buffers are gone."""
        self.now_bytes = 0
        self._pending.clear()
