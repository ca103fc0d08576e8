"""Convolutions for sampling compute what the layers compute, and fall back to the layers where they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from floyd.nn import convolution
from floyd.nn.convolution import Convolutions, Doubling, PackedConv, PackedDoubling, can_pack, transposed_kernel
from floyd.runtime.switches import Switches

needs_onednn = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this torch has no oneDNN")
ON = Switches.on()


def layer(*args: Any, **keywords: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(*args, **keywords)


def images(channels: int, height: int = 8, width: int = 6, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, channels, height, width)


@needs_onednn
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "conv",
    [
        layer(3, 16, 3, padding=1),
        layer(16, 32, 3, padding=1, stride=2),
        layer(16, 5, 5, padding=2, bias=False),
        layer(16, 16, 3, padding=2, dilation=2, groups=4),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_packed_convolution_computes_what_the_layer_does_at_every_size(conv: nn.Conv2d, channels_last: bool) -> None:
    ready = Convolutions(ON).ready(conv)
    assert isinstance(ready, PackedConv)
    for height, width, batch in ((8, 6, 2), (16, 16, 2), (16, 16, 3), (8, 6, 2)):
        x_BCHW = images(conv.in_channels, height, width, batch)
        if channels_last:
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ready(x_BCHW), conv(x_BCHW), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", [Doubling, pytest.param(PackedDoubling, marks=needs_onednn)])
@torch.no_grad()
def test_a_transposed_convolution_doubles_and_convolves(kind: Any, channels_last: bool) -> None:
    conv, x_BCHW = layer(16, 24, 3, padding=1), images(16)
    expected = conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
    if channels_last:
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(kind(conv)(x_BCHW), expected, atol=1e-5, rtol=1e-5)


def test_the_transposed_kernel_is_exact_in_double_precision() -> None:
    weight_OIAB, x_BCHW = torch.randn(5, 4, 3, 3, dtype=torch.float64), images(4).double()
    expected = F.conv2d(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"), weight_OIAB, padding=1)
    got = F.conv_transpose2d(x_BCHW, transposed_kernel(weight_OIAB), stride=2, padding=1)
    torch.testing.assert_close(got, expected, atol=1e-13, rtol=1e-13)


class Adapted(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("conv", "switches"),
    [
        (Adapted(4, 4, 3, padding=1), ON),
        (layer(4, 4, 1), ON),
        (layer(4, 4, 3, padding=1, padding_mode="reflect"), ON),
        (layer(4, 4, 3, padding="same"), ON),
        (layer(4, 4, 3, padding=1), Switches.off()),
        (layer(4, 4, 3, padding=1).double(), ON),
    ],
    ids=["adapted", "one tap", "another padding", "a named padding", "switched off", "double precision"],
)
def test_what_cannot_be_packed_stays_as_it_is(conv: nn.Conv2d, switches: Switches) -> None:
    assert Convolutions(switches).ready(conv) is conv


@pytest.mark.parametrize("conv", [layer(4, 4, 5, padding=2), Adapted(4, 4, 3, padding=1)], ids=["5x5", "adapted"])
@torch.no_grad()
def test_a_doubling_that_cannot_be_rewritten_is_done_in_two(conv: nn.Conv2d) -> None:
    x_BCHW = images(4)
    expected = conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(Convolutions(ON).doubling(conv)(x_BCHW), expected, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_packed_weights_take_no_more_memory_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    convs = [layer(8, 8, 3, padding=1) for _ in range(3)]
    monkeypatch.setattr(convolution, "MOST_PACKED_BYTES", 4 * convs[0].weight.nbytes)
    make = Convolutions(ON)
    assert [type(make.ready(conv)) for conv in convs] == [PackedConv, PackedConv, nn.Conv2d]


@needs_onednn
@torch.no_grad()
def test_half_precision_is_packed_where_the_machine_computes_in_it() -> None:
    conv = layer(16, 16, 3, padding=1).bfloat16()
    x_BCHW = images(16).bfloat16()
    ready = Convolutions(ON).ready(conv)
    assert isinstance(ready, PackedConv) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    torch.testing.assert_close(ready(x_BCHW), conv(x_BCHW), atol=2e-2, rtol=2e-2)
