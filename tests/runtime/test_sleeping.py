"""A network that sleeps has no weights in memory, and has them again when it is used."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from floyd.runtime.budget import process_bytes
from floyd.runtime.placement import OneAtATime, WhereTheyAre, device_of, rest
from floyd.runtime.sleeping import (
    can_sleep,
    drop_fetched,
    fetch_ahead,
    forget,
    is_asleep,
    put_to_sleep,
    release,
    remember,
    wake,
)

HERE = WhereTheyAre()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"width": 4}
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight  # tied
        self.register_buffer("ramp", torch.arange(4.0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.first.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.ramp


def made() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


@pytest.fixture
def net() -> Net:
    network = made()
    remember(network, made)
    return network


def test_a_sleeping_network_has_no_weights_and_can_still_be_asked(net: Net) -> None:
    gone = weakref.ref(net.first.weight)
    put_to_sleep(net)
    gc.collect()
    assert gone() is None
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {"meta"}
    assert (net.config, is_asleep(net), device_of(net)) == ({"width": 4}, True, torch.device("cpu"))


@pytest.mark.parametrize("plan", [HERE, OneAtATime(torch.device("cpu"))])
def test_whoever_uses_it_wakes_it_for_good(net: Net, plan: WhereTheyAre | OneAtATime) -> None:
    expected = net(torch.ones(1, 4))
    rest(net)
    with plan.use(net) as ready:
        assert torch.equal(ready(torch.ones(1, 4)), expected)
        assert ready.second.weight is ready.first.weight
    assert not is_asleep(net)


def test_one_that_naps_sleeps_again_after_its_last_user() -> None:
    network = made()
    remember(network, made, naps=True)
    put_to_sleep(network)
    with HERE.use(network):
        with HERE.use(network):
            assert not is_asleep(network)
        assert not is_asleep(network)
    assert is_asleep(network)


def test_what_is_fetched_ahead_is_read_by_another_thread_and_once() -> None:
    network = made()
    readers: list[int] = []
    came = threading.Event()

    def load() -> Net:
        readers.append(threading.get_ident())
        came.set()
        return made()

    remember(network, load)
    fetch_ahead(network)  # it is awake: there is nothing to fetch
    assert not readers
    put_to_sleep(network)
    fetch_ahead(network)
    fetch_ahead(network)
    assert came.wait(10)
    wake(network)
    assert len(readers) == 1
    assert readers[0] != threading.get_ident()
    assert torch.equal(network.first.weight, made().first.weight)


def test_what_was_fetched_in_vain_is_dropped(net: Net) -> None:
    held: list[weakref.ref[nn.Module]] = []

    def load() -> Net:
        fetched = made()
        held.append(weakref.ref(fetched))
        return fetched

    remember(net, load)
    put_to_sleep(net)
    fetch_ahead(net)
    for thread in threading.enumerate():
        if thread.name == "floyd-fetch":
            thread.join(10)
    drop_fetched(net)
    gc.collect()
    assert held[0]() is None


def test_a_failure_to_read_reaches_whoever_waits(net: Net) -> None:
    def load() -> Net:
        raise OSError("the disk is gone")

    remember(net, load)
    put_to_sleep(net)
    fetch_ahead(net)
    with pytest.raises(OSError, match="the disk is gone"):
        wake(net)


def test_it_wakes_in_the_precision_in_which_it_fell_asleep(net: Net) -> None:
    net.to(torch.bfloat16)
    put_to_sleep(net)
    wake(net)
    assert net.dtype == torch.bfloat16


def test_a_network_in_use_is_not_put_to_sleep(net: Net) -> None:
    with HERE.use(net), pytest.raises(RuntimeError, match="in use and cannot be unloaded"):
        rest(net)
    rest(net)
    assert is_asleep(net)


def test_one_that_came_from_nowhere_keeps_its_weights(net: Net) -> None:
    forget(net)
    assert not can_sleep(net)
    with pytest.raises(ValueError, match="its weights would be lost"):
        put_to_sleep(net)
    rest(net)
    assert not net.first.weight.is_meta


def test_release_may_always_be_called() -> None:
    release()


def test_the_system_gets_the_memory_back_that_a_network_leaves() -> None:
    def large() -> nn.Module:
        return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(24)]).requires_grad_(False)  # 100 MB

    network = large()
    remember(network, large)
    before = process_bytes()
    put_to_sleep(network)
    release()
    asleep = process_bytes()
    assert before - asleep > 80_000_000
    wake(network)
    assert process_bytes() - asleep > 80_000_000
