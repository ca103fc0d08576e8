from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from floyd.training.ema import Ema


def weight_of(value: float) -> Any:
    model: Any = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def shadow(ema: Ema) -> float:
    return float(ema.shadow["weight"])


def test_the_mean_is_the_recursion_with_a_warmed_up_decay() -> None:
    model, values, expected = weight_of(0.0), [3.0, -1.0, 2.0, 5.0], 0.0
    ema = Ema(model, decay=0.2)
    for n, value in enumerate(values, start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(model)
        decay = min(0.2, n / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert shadow(ema) == pytest.approx(expected, rel=1e-6)


def test_the_mean_of_weights_that_stay_is_those_weights() -> None:
    model = weight_of(1.7)
    ema = Ema(model, decay=0.999)
    for _ in range(20):
        ema.update(model)
    assert shadow(ema) == pytest.approx(1.7)


def test_the_mean_is_no_view_of_the_weights() -> None:
    model = weight_of(1.0)
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(9.0)
    assert shadow(ema) == 1.0


def test_the_models_own_weights_come_back_even_after_an_error() -> None:
    model = weight_of(1.0)
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(4.0)
    seen = []

    def look_and_fail() -> None:
        with ema.applied(model) as averaged:
            seen.append(averaged.state_dict()["weight"].item())
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        look_and_fail()
    assert seen == [1.0]
    assert float(model.weight.detach()) == 4.0


def test_a_state_that_was_read_back_goes_on_as_it_would_have() -> None:
    model = weight_of(0.0)
    one = Ema(model, decay=0.9)
    with torch.no_grad():
        model.weight.fill_(2.0)
    one.update(model)
    other = Ema(weight_of(-5.0), decay=0.9)
    other.load_state_dict(one.state_dict())
    for ema in (one, other):
        ema.update(model)
    assert shadow(one) == shadow(other)
    assert other.num_updates == 2


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_outside_of_the_unit_interval_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        Ema(weight_of(0.0), decay)


def test_what_is_frozen_is_not_averaged_and_a_decay_of_zero_keeps_nothing() -> None:
    model: Any = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert set(Ema(model, 0.9).shadow) == {"weight"}
    none = Ema(model, 0.0)
    none.update(model)
    before = model.weight.detach().clone()
    none.copy_to(model)
    with none.applied(model):
        assert torch.equal(model.weight, before)
    assert none.shadow == {}
