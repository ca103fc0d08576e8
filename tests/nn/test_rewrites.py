"""What is not plainly the layer that a rewrite knows computes as it always does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from floyd.nn.rewrites import Joined, elementwise, is_exactly, is_watched, version_of


class Adapted(nn.Linear):
    pass


class Quantized(torch.Tensor):
    pass


def hooked() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    return layer


def expecting() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


def replaced() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def parametrized() -> nn.Linear:
    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


def quantized() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Quantized), requires_grad=False)
    return layer


NOT_PLAIN = [Adapted(2, 2), hooked(), expecting(), replaced(), parametrized(), quantized()]


@pytest.mark.parametrize(
    "layer", NOT_PLAIN, ids=["adapted", "hook", "pre-hook", "forward", "parametrized", "quantized"]
)
def test_a_layer_that_is_more_than_a_layer_is_not_joined(layer: nn.Linear) -> None:
    assert is_exactly(nn.Linear(2, 2), nn.Linear)
    assert not is_exactly(layer, nn.Linear)
    assert Joined.of([nn.Linear(2, 2), layer]) is None


def test_hooks_and_replaced_methods_watch() -> None:
    assert [is_watched(layer) for layer in NOT_PLAIN[:4]] == [False, True, True, True]


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_compute_what_each_computes(bias: bool) -> None:
    layers, x = [nn.Linear(4, width, bias=bias) for width in (3, 5, 4)], torch.randn(2, 7, 4)
    joined = Joined.of(layers)
    assert joined is not None
    torch.testing.assert_close(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))


def test_layers_of_different_kinds_are_not_joined() -> None:
    assert Joined.of([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)]) is None
    assert Joined.of([nn.Linear(4, 4), nn.Linear(4, 4).double()]) is None


@pytest.mark.parametrize("function", [nn.GELU(), nn.SiLU()])
def test_a_function_of_each_number_keeps_numbers_and_layout(function: nn.Module) -> None:
    x_BCHW = torch.randn(2, 3, 4, 5)
    for laid_out in (x_BCHW, x_BCHW.contiguous(memory_format=torch.channels_last), x_BCHW.transpose(2, 3)):
        got = elementwise(function, laid_out)
        torch.testing.assert_close(got, function(laid_out))
    assert elementwise(function, x_BCHW.to(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_the_version_counts_what_is_written() -> None:
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) > before
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) == 0
