"""How fast the machine computes is a number that it reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from floyd.runtime import rates
from floyd.runtime.rates import Arithmetic, Rate, measured

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "LOOK_S", 0.0)
    monkeypatch.setattr(rates, "ENOUGH_S", 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rate_is_measured_in_the_precision_that_was_asked_for(dtype: torch.dtype) -> None:
    rate = measured(Arithmetic(CPU, dtype))
    assert rate is not None
    assert 1e8 < rate.flops < 1e16
    assert rate.threads == torch.get_num_threads()
    assert rate.to_json()["dtype"] == str(dtype).removeprefix("torch.")


def test_the_faster_kind_of_work_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {rates._product: 3e9, rates._convolution: 5e9}
    monkeypatch.setattr(rates, "_best", lambda kind, arithmetic: found[kind])
    rate = measured(Arithmetic(CPU, torch.float32))
    assert rate is not None
    assert str(rate) == "5 GFLOP/s in float32 on cpu, 1 thread"


def test_what_cannot_be_computed_has_no_rate() -> None:
    assert measured(Arithmetic(CPU, torch.bool)) is None


def test_a_full_memory_ends_the_search_with_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "ENOUGH_S", 1e9)  # never enough: on to the next size
    real: Any = rates._filled

    def scarce(arithmetic: Arithmetic, *shape: int) -> torch.Tensor:
        if max(shape) > 256:
            raise torch.OutOfMemoryError("no more")
        made: torch.Tensor = real(arithmetic, *shape)
        return made

    monkeypatch.setattr(rates, "_filled", scarce)
    rate = measured(Arithmetic(CPU, torch.float32))
    assert rate is not None
    assert rate.flops > 0


def test_large_rates_are_told_in_teraflops() -> None:
    assert str(Rate(Arithmetic(torch.device("cuda:0"), torch.bfloat16), 7.2e14, None)) == (
        "720 TFLOP/s in bfloat16 on cuda:0"
    )
