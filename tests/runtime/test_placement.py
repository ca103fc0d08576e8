"""Weights are where they are needed for as long as they are needed, and come home even from a failure."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.mac import Mac
from torch import Tensor, nn

from floyd.runtime.placement import (
    LayerByLayer,
    OneAtATime,
    Placement,
    WhereTheyAre,
    best_device,
    device_of,
    reachable,
    send,
)

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


@pytest.mark.parametrize("device", ["cuda:99", "hpu", 99])
def test_a_device_that_is_not_there_is_named_with_those_that_are(device: Any) -> None:
    with pytest.raises(ValueError, match=rf"cannot compute on '{device}'.*finds cpu"):
        reachable(device)


def test_a_device_that_is_there_is_reached() -> None:
    assert reachable("cpu") == reachable(CPU) == CPU
    assert reachable("meta") == META


@pytest.mark.parametrize("mark", [{"is_quantized": True}, {"hf_device_map": {"a": "cpu", "b": "disk"}}], ids=str)
@pytest.mark.parametrize("plan", [WhereTheyAre(), OneAtATime(META), LayerByLayer(META)])
def test_what_others_have_placed_for_good_stays_where_it_is(plan: Placement, mark: dict[str, Any]) -> None:
    """A quantized network, and one that accelerate has spread out: neither may be moved."""
    diary: list[str] = []
    network = Network(diary)
    for name, value in mark.items():
        setattr(network, name, value)
    with plan.use(network) as ready:
        assert ready is network
        assert not network._forward_pre_hooks
    assert diary == []
    assert plan.device_of(network) == CPU


def test_a_network_that_is_spread_out_computes_on_its_accelerator() -> None:
    network: Any = nn.Linear(1, 1)
    network.hf_device_map = {"a": "cpu", "b": "meta", "c": "disk"}
    assert device_of(network) == META
    network.hf_device_map = {"": "cpu"}  # whole, and so ours to place
    assert OneAtATime(META).device_of(network) == META


# -------------------------------------------------------------------------------------------- calls at the same time


class Slow(nn.Module):
    """A network that may be used by several threads; it waits for the others in the midst of its work."""

    def __init__(self, meeting: threading.Barrier) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.shift = nn.Parameter(torch.ones(2))
        self.meeting = meeting

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.meeting.wait(10)
        return self.second(x) + self.shift


@pytest.mark.parametrize("plan", [OneAtATime(torch.device("mps:0")), LayerByLayer(torch.device("mps:0"))])
def test_calls_at_the_same_time_share_a_network_that_moves(plan: Placement) -> None:
    num_calls, rounds = 3, 8
    network = Slow(threading.Barrier(num_calls)).requires_grad_(False)
    x = torch.ones(1, 2)

    def call(i: int) -> list[Tensor]:
        outs = []
        with Mac():
            for _ in range(rounds):
                with plan.use(network) as ready:
                    outs.append(ready((x * i).to(plan.device_of(network))).cpu())
        return outs

    with Mac(), ThreadPoolExecutor(num_calls) as pool:
        answers = list(pool.map(call, range(num_calls)))
    assert device_of(network) == CPU
    assert not network._forward_pre_hooks
    assert not network.first._forward_hooks
    network.meeting = threading.Barrier(1)
    for i, outs in enumerate(answers):
        assert all(torch.equal(out, network(x * i)) for out in outs)


def test_who_comes_first_brings_a_network_and_who_leaves_last_takes_it_home() -> None:
    diary: list[str] = []
    network = Network(diary)
    first, second = OneAtATime(META).use(network), OneAtATime(META).use(network)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert diary == ["all to meta"]
    second.__exit__(None, None, None)
    assert diary == ["all to meta", "all to cpu"]


def test_a_network_cannot_be_in_two_places() -> None:
    network = nn.Linear(1, 1)
    with (
        WhereTheyAre().use(network),
        pytest.raises(RuntimeError, match=r"in use as WhereTheyAre.* give all pipelines that share it the same"),
        OneAtATime(META).use(network),
    ):
        raise AssertionError("it was moved away from under the first")
    assert device_of(network) == CPU
    with LayerByLayer(CPU).use(network):
        pass


def test_a_network_that_does_not_fit_on_the_device_is_taken_home_and_free_for_the_next() -> None:
    class Big(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            if args[0] == META:
                raise MemoryError("too big")
            return super().to(*args, **kwargs)

    network = Big(1, 1)
    with pytest.raises(MemoryError), OneAtATime(META).use(network):
        pass
    with WhereTheyAre().use(network):
        assert device_of(network) == CPU


# ------------------------------------------------------------------------------------------------------- sent away


def test_what_is_sent_is_cast_but_for_whole_numbers() -> None:
    network = nn.BatchNorm1d(2)
    send(network, dtype=torch.float16)
    assert (network.weight.dtype, network.running_mean.dtype) == (torch.float16, torch.float16)
    assert network.num_batches_tracked.dtype == torch.int64
    send(network, device=META)
    assert (network.weight.device, network.weight.dtype) == (META, torch.float16)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_layers_that_overflow_in_float16_stay_in_float32(dtype: torch.dtype, kept: torch.dtype) -> None:
    network = nn.Sequential()
    network.add_module("wi", nn.Linear(2, 2))
    network.add_module("wo", nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    network._keep_in_fp32_modules = {"wo"}  # type: ignore[assignment]
    send(network, dtype=dtype, device=META)
    assert {name: p.dtype for name, p in network.named_parameters()} == {
        "wi.weight": dtype, "wi.bias": dtype,
        "wo.0.weight": kept, "wo.0.bias": kept, "wo.1.weight": kept, "wo.1.bias": kept,
    }  # fmt: skip
    assert {p.device for p in network.parameters()} == {META}
    assert network.wo[1].num_batches_tracked.dtype == torch.int64  # type: ignore[index]


# ------------------------------------------------------------------------------------------------- nothing goes back


def test_what_main_memory_keeps_is_not_copied_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved to a device of another kind and home again, the weights are the tensors that they were."""
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    places = [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]
    with Mac(), OneAtATime(torch.device("mps:0")).use(network) as ready:
        assert device_of(ready).type == "mps"
    assert [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())] == places


def test_what_was_changed_on_the_device_comes_home_changed() -> None:
    network = nn.Linear(4, 4).requires_grad_(False)
    with Mac(), OneAtATime(torch.device("mps:0")).use(network) as ready:
        ready.weight.fill_(3.0)
    assert network.weight.eq(3).all()
