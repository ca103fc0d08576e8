"""A network that does not fit goes through the ring layer by layer, and computes what it computes where it fits.

The device counts bytes, and copies as late as it may: whoever forgets to wait computes with what is not a number.
"""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from floyd.runtime.parts import least_bytes, smallest_ring
from floyd.runtime.streaming import Streamed
from floyd.runtime.transfers import CountingTransfers

CPU = torch.device("cpu")
LAYER = 16 * 16 * 4 + 256  # weight and bias, each at a multiple of 256 bytes


class Tower(nn.Module):
    """Reads once, then steps; the layers of the first are not those of the second. Owns a weight itself."""

    def __init__(self, num_layers: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.steps = nn.ModuleList([nn.Linear(16, 16) for _ in range(num_layers)])
        self.shift = nn.Parameter(torch.ones(16))
        self.requires_grad_(False)

    def read(self, text: Tensor) -> Tensor:
        return self.reads[1](self.reads[0](text))

    def step(self, x: Tensor, context: Tensor) -> Tensor:
        for layer in self.steps:
            x = torch.tanh(layer(x)) + context
        return x + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.read(x))


def painted(network: Tower, num_steps: int = 3) -> Tensor:
    x = torch.linspace(-1, 1, 16)[None]
    context = network.read(x)
    for _ in range(num_steps):
        x = network.step(x, context)
    return x


def streamed(budget: int, slots: int = 2) -> tuple[Streamed, CountingTransfers]:
    transfers = CountingTransfers()
    return Streamed(CPU, budget, slots, transfers), transfers


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("num_fitting", [3, 4, 5, 6, 7, 8, 9])
def test_whatever_fits_it_computes_the_same_within_the_budget(num_fitting: int, slots: int) -> None:
    network = Tower()
    expected = painted(network)
    budget = num_fitting * LAYER + 256
    plan, transfers = streamed(budget, slots)
    for _ in range(2):  # the second time the route is known
        transfers.released()
        transfers.peak_bytes = 0
        with plan.use(network) as ready:
            assert torch.equal(painted(ready), expected)
        assert 0 < transfers.peak_bytes <= budget
    assert torch.equal(painted(network), expected)  # it lies in main memory again, whole


def test_what_fits_is_copied_once_and_stays() -> None:
    network = Tower()
    plan, transfers = streamed(100 * LAYER)
    with plan.use(network) as ready:
        painted(ready, 5)
        assert transfers.copied_bytes == transfers.peak_bytes == 8 * LAYER + 256


def test_of_a_network_that_does_not_fit_only_the_rest_is_copied_again() -> None:
    network = Tower()
    plan, transfers = streamed(5 * LAYER + 256)  # two slots, three layers that stay
    with plan.use(network) as ready:
        painted(ready)
    transfers.copies.clear()
    with plan.use(network) as ready:  # knows which layers are called at every step, and lets those stay
        painted(ready, 10)
    steps = [size for size, _ in transfers.copies if size == LAYER]
    assert len(steps) <= 2 + 3 + 10 * 3 + 1  # read, stay, pass; and what was fetched in vain at the end


def test_a_layer_is_on_its_way_while_the_one_before_it_computes() -> None:
    network = Tower()
    plan, transfers = streamed(2 * LAYER + 256)
    on_its_way: list[int] = []
    network.steps[2].register_forward_hook(lambda *_: on_its_way.append(len(transfers._pending)))
    with plan.use(network) as ready:
        painted(ready)
    assert on_its_way == [1, 1, 1]


def test_a_slot_is_filled_again_only_after_what_computed_with_it() -> None:
    """Each copy into a used slot waits for a mark that was made when the layer before left it."""
    network = Tower()
    plan, transfers = streamed(2 * LAYER + 256)
    with plan.use(network) as ready:
        painted(ready)
    waited = [mark for size, mark in transfers.copies if size == LAYER]
    assert waited[:2] == [None, None]
    assert all(mark is not None for mark in waited[2:])
    assert waited[2:] == sorted(waited[2:])


def test_main_memory_keeps_the_weights_and_nothing_is_copied_back() -> None:
    network = Tower()
    plan, _ = streamed(3 * LAYER + 256)
    with plan.use(network):
        pass
    before = [p.data_ptr() for p in network.parameters()]
    with plan.use(network) as ready:
        painted(ready)
    assert [p.data_ptr() for p in network.parameters()] == before


def test_weights_changed_between_two_journeys_are_the_new_ones() -> None:
    network = Tower()
    plan, _ = streamed(3 * LAYER + 256)
    with plan.use(network) as ready:
        painted(ready)
    network.load_state_dict({key: weight + 0.1 for key, weight in network.state_dict().items()}, assign=True)
    expected = painted(network)
    with plan.use(network) as ready:
        assert torch.equal(painted(ready), expected)


def test_a_failure_brings_everything_home() -> None:
    network = Tower()
    expected = painted(network)
    plan, _ = streamed(3 * LAYER + 256)
    network.steps[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), plan.use(network) as ready:
        painted(ready)
    network.steps[3]._forward_hooks.clear()
    assert torch.equal(painted(network), expected)
    assert not network.steps[0]._forward_hooks
    assert not network._forward_pre_hooks


def test_calls_at_the_same_time_share_the_ring() -> None:
    network = Tower()
    expected = painted(network, 6)
    plan, transfers = streamed(3 * LAYER + 256)

    def call(_: int) -> Tensor:
        with torch.no_grad(), plan.use(network) as ready:
            return painted(ready, 6)

    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(call, range(6)))
    assert transfers.peak_bytes <= 6 * (3 * LAYER + 256)  # as many journeys as calls, if none overlapped


class Gate(nn.Linear):
    """Waits in the midst of its work, and looks whether its weights are still where they were."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.entered, self.opened = threading.Event(), threading.Event()
        self.moved = False

    def forward(self, x: Tensor) -> Tensor:
        before = self.weight.data_ptr()
        self.entered.set()
        assert self.opened.wait(10)
        self.moved |= self.weight.data_ptr() != before
        return super().forward(x)


def test_a_slot_in_use_by_one_call_is_not_taken_by_another() -> None:
    network = nn.ModuleList([Gate(), *[nn.Linear(16, 16) for _ in range(5)]]).requires_grad_(False)
    gate, x = network[0], torch.ones(1, 16)
    assert isinstance(gate, Gate)
    with streamed(2 * LAYER)[0].use(network), ThreadPoolExecutor(1) as pool:
        held = pool.submit(gate, x)
        assert gate.entered.wait(10)
        for layer in network[1:]:
            layer(x)
        gate.opened.set()
        held.result(10)
    assert not gate.moved


def test_too_small_a_budget_says_how_much_is_needed() -> None:
    network = Tower()
    need = 2 * LAYER + 256
    plan, _ = streamed(need - 1)
    with pytest.raises(ValueError, match=f"need {need}"), plan.use(network):
        pass
    with streamed(need)[0].use(network) as ready:
        painted(ready)


def test_tied_weights_and_other_layouts_come_through() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    network.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
    network[3].weight = network[2].weight
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = network(x)
    plan, _ = streamed(4000)
    with plan.use(network) as ready:
        assert torch.equal(ready(x), expected)
        assert ready[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_network_that_was_streamed_can_be_forgotten() -> None:
    network = Tower()
    with streamed(3 * LAYER + 256)[0].use(network) as ready:
        painted(ready)
    gone = weakref.ref(network)
    del network, ready
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("field", [{"slots": 1}, {"budget_bytes": 0}])
def test_a_ring_needs_two_slots_and_some_room(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 slots|more than 0"):
        Streamed(**{"device": CPU, "budget_bytes": 1, **field})


def test_the_smallest_slots_leave_the_most_room() -> None:
    units = [100, 10, 10, 10, 10]
    assert smallest_ring(units, 140) == (0, 140)  # all of it
    assert smallest_ring(units, 130) == (10, 110)
    assert smallest_ring(units, 119) is None
    assert smallest_ring([100, 60, 10], 170) == (0, 170)
    assert smallest_ring([100, 60, 10], 150) is None
    assert least_bytes(units) == 120
    assert least_bytes([50, 50, 50, 50]) == 100


# ------------------------------------------------------------------------------------------------------------ on CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("num_fitting", [2, 4, 8])
def test_on_cuda_it_computes_the_same_within_the_budget(num_fitting: int) -> None:
    cuda = torch.device("cuda")
    torch.manual_seed(0)
    network = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)]).requires_grad_(False)
    x = torch.randn(64, 2048)
    there = network.to(cuda)
    expected = there(there(x.to(cuda)))
    network = there.to("cpu")
    del there
    torch.cuda.empty_cache()
    layer = 2048 * 2048 * 4 + 2048 * 4
    budget = num_fitting * layer
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan = Streamed(cuda, budget)
    for _ in range(3):
        with plan.use(network) as ready:
            out = ready(ready(x.to(cuda)))
        torch.testing.assert_close(out, expected)
    working = 8 * 64 * 2048 * 4
    assert torch.cuda.max_memory_allocated() - before <= budget + working + 33 * 2**20  # and cuBLAS's own
    assert {p.device.type for p in network.parameters()} == {"cpu"}


@pytest.mark.gpu
def test_on_cuda_nothing_waits_for_the_whole_device() -> None:
    cuda = torch.device("cuda")
    network = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]).requires_grad_(False)
    x = torch.randn(4, 256, device=cuda)
    with Streamed(cuda, 3 * (256 * 256 * 4 + 1024)).use(network) as ready:
        ready(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                ready(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
