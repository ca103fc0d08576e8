"""A running mean of the weights, which draws better pictures than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of what is trained, warmed up: the first steps are forgotten soon.

    With a decay of 0 it is the weights themselves, and nothing is kept.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}.")
        self.decay = decay
        self.num_updates = 0
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad and decay}
        self.shadow = {name: p.detach().clone() for name, p in trained.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        share = 1 - min(self.decay, self.num_updates / (10 + self.num_updates))
        parameters = dict(model.named_parameters())
        if not self.shadow:
            return
        torch._foreach_lerp_(list(self.shadow.values()), [parameters[name].detach() for name in self.shadow], share)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the averaged weights; its own come back afterwards."""
        own = {name: p.detach().clone() for name, p in model.named_parameters() if name in self.shadow}
        self.copy_to(model)
        try:
            yield model
        finally:
            _copy(own, model)

    def copy_to(self, model: nn.Module) -> None:
        _copy(self.shadow, model)

    def state_dict(self) -> dict[str, object]:
        return {"shadow": self.shadow, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        shadow = state["shadow"]
        assert isinstance(shadow, dict)
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
        self.num_updates = int(str(state["num_updates"]))


@torch.no_grad()
def _copy(values: dict[str, Tensor], model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values[name])
