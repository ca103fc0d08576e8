"""Weights are where they are needed for as long as they are needed, and come home even from a failure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from floyd.runtime.placement import LayerByLayer, OneAtATime, Placement, WhereTheyAre, best_device, device_of

CPU, META = torch.device("cpu"), torch.device("meta")


class Traveller(nn.Linear):
    """Keeps a diary of where it was sent."""

    def __init__(self, width: int, diary: list[str], name: str) -> None:
        super().__init__(width, width)
        self.diary, self.name = diary, name

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.diary.append(f"{self.name} to {args[0]}")
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.diary.append(f"{self.name} works")
        return super().forward(x)


class Network(nn.Module):
    def __init__(self, diary: list[str]) -> None:
        super().__init__()
        self.first = Traveller(2, diary, "first")
        self.second = Traveller(2, diary, "second")
        self.shift = nn.Parameter(torch.ones(2))
        self.diary = diary

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.diary.append(f"all to {args[0]}")
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.shift


def test_nothing_moves_where_nothing_should() -> None:
    diary: list[str] = []
    network = Network(diary)
    with WhereTheyAre().use(network) as same:
        assert same is network
    assert diary == []


def test_one_at_a_time_brings_a_network_and_takes_it_home() -> None:
    diary: list[str] = []
    with OneAtATime(META).use(Network(diary)):
        assert diary == ["all to meta"]
    assert diary == ["all to meta", "all to cpu"]


def test_layer_by_layer_brings_each_layer_for_its_own_work() -> None:
    diary: list[str] = []
    network = Network(diary)
    with LayerByLayer(CPU).use(network) as ready:
        ready(torch.ones(1, 2))
    assert diary == [
        "first to cpu", "first works", "first to cpu",
        "second to cpu", "second works", "second to cpu",
        "all to cpu",
    ]  # fmt: skip


def test_layer_by_layer_brings_the_inputs_and_weights_that_belong_to_no_layer() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()
            self.shift = nn.Parameter(torch.ones(2))
            self.register_buffer("ramp", torch.arange(2.0))

        def forward(self, x: Tensor, *, more: Tensor) -> tuple[torch.device, ...]:
            return x.device, more.device, self.shift.device, self.ramp.device

        def to(self, *args: Any, **kwargs: Any) -> Any:
            return self  # nothing comes home from the meta device

    with LayerByLayer(META).use(Adds()) as ready:
        assert set(ready(torch.ones(1), more=torch.ones(1))) == {META}


@pytest.mark.parametrize("plan", [OneAtATime(CPU), LayerByLayer(CPU)])
def test_a_failure_takes_the_network_home(plan: Placement) -> None:
    diary: list[str] = []
    network = Network(diary)
    with pytest.raises(RuntimeError, match="stop"), plan.use(network):
        raise RuntimeError("stop")
    assert diary[-1] == "all to cpu"
    assert not network._forward_pre_hooks
    assert not network.first._forward_hooks


@pytest.mark.parametrize("plan", [WhereTheyAre(), OneAtATime(META), LayerByLayer(META)])
def test_what_is_no_network_stays_where_it_is(plan: Placement) -> None:
    def function() -> None: ...

    with plan.use(function) as same:
        assert same is function
    with plan.use(None) as nothing:
        assert nothing is None
    assert plan.device_of(function) == CPU


def test_a_network_in_use_computes_on_the_device() -> None:
    network = nn.Linear(1, 1)
    assert WhereTheyAre().device_of(network) == device_of(network) == CPU
    assert OneAtATime(META).device_of(network) == LayerByLayer(META).device_of(network) == META


def test_the_best_device_is_an_accelerator_where_there_is_one() -> None:
    assert (best_device() == CPU) != torch.accelerator.is_available()
