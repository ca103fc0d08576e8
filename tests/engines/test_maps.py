"""Each kernel alone, against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from floyd.engines.maps import Map, Maps
from floyd.engines.native import SOURCES, Kernels

DTYPES = (torch.float32, torch.bfloat16)
ACTS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "gelu": F.gelu, "silu": F.silu}


@pytest.fixture
def maps(compiled: Kernels) -> Maps:
    return Maps(compiled)


def a_map(dtype: torch.dtype, seed: int = 0, *, at: float = 0.0) -> Tensor:
    """[2, 32, 15, 10]: more pixels than one chunk, and no whole number of them."""
    x_BCHW = torch.randn(2, 32, 15, 10, generator=torch.Generator().manual_seed(seed)) + at
    return x_BCHW.to(dtype).contiguous(memory_format=torch.channels_last)


def factors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    a_BC, b_BC, c_BC = torch.randn(3, 2, 32)
    return a_BC, b_BC, c_BC


def affine(x_BCHW: Tensor, a_BC: Tensor, b_BC: Tensor) -> Tensor:
    return x_BCHW.double() * a_BC[:, :, None, None] + b_BC[:, :, None, None]


def rounding(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 1e-6}


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_about_the_first_pixel(maps: Maps, dtype: torch.dtype) -> None:
    x_BCHW = a_map(dtype, at=100)
    apart_BCP = (x_BCHW.double() - x_BCHW.double()[:, :, :1, :1]).flatten(2)
    expected = torch.stack([apart_BCP.sum(-1), apart_BCP.square().sum(-1)], dim=1)
    torch.testing.assert_close(maps.sums(x_BCHW), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_every_number_is_scaled_shifted_and_activated(maps: Maps, act: str, dtype: torch.dtype) -> None:
    x_BCHW, (a_BC, b_BC, _) = a_map(dtype), factors()
    expected = ACTS[act](affine(x_BCHW, 5 * a_BC, b_BC))
    out_BCHW = maps.mapped(x_BCHW, 5 * a_BC, b_BC, act)
    assert out_BCHW.dtype == dtype
    torch.testing.assert_close(out_BCHW.double(), expected, **rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_back_through_the_activation(maps: Maps, act: str, dtype: torch.dtype) -> None:
    x_BCHW, grad_BCHW, (a_BC, b_BC, middle_BC) = a_map(dtype), a_map(dtype, 1), factors()
    h_BCHW = affine(x_BCHW, a_BC, b_BC).requires_grad_()
    expected = torch.autograd.grad(ACTS[act](h_BCHW), h_BCHW, grad_BCHW.double())[0]
    out_BCHW, sums_B2C = maps.back_to_norm(grad_BCHW, x_BCHW, a_BC, b_BC, middle_BC, act)
    torch.testing.assert_close(out_BCHW.double(), expected, **rounding(dtype))
    about_BCHW = x_BCHW.double() - middle_BC[:, :, None, None]
    sums = torch.stack([expected.sum((2, 3)), (expected * about_BCHW).sum((2, 3))], dim=1)
    torch.testing.assert_close(sums_B2C, sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_maps_are_mixed_in_place(maps: Maps, dtype: torch.dtype) -> None:
    out_BCHW, x_BCHW, (a_BC, b_BC, c_BC) = a_map(dtype), a_map(dtype, 1), factors()
    expected = affine(out_BCHW, a_BC, c_BC) + affine(x_BCHW, b_BC, torch.zeros_like(c_BC))
    maps.mix(out_BCHW, x_BCHW, a_BC, b_BC, c_BC)
    torch.testing.assert_close(out_BCHW.double(), expected, **{**rounding(dtype), "atol": 1e-5})


def test_factors_may_be_views(maps: Maps) -> None:
    x_BCHW, (a_BC, b_BC, _) = a_map(torch.float32), factors()
    one_BC = a_BC[:1].expand(2, -1)
    strided_BC = torch.stack([b_BC, a_BC], dim=-1)[..., 0]
    expected = maps.mapped(x_BCHW, one_BC.contiguous(), b_BC, "none")
    assert torch.equal(maps.mapped(x_BCHW, one_BC, strided_BC, "none"), expected)


def test_bfloat16_keeps_what_is_no_number(maps: Maps) -> None:
    """A loss that is none stops a run; it must not be lost on the way."""
    x_BCHW = a_map(torch.bfloat16)
    x_BCHW[0, 3, 2, 2], x_BCHW[1, 5, 0, 1] = float("nan"), float("inf")
    ones_BC = torch.ones(2, 32)
    out_BCHW = maps.mapped(x_BCHW, ones_BC, 0 * ones_BC, "none")
    assert torch.equal(out_BCHW.isnan(), x_BCHW.isnan())
    assert torch.equal(out_BCHW.isinf(), x_BCHW.isinf())


def test_the_structure_has_the_fields_of_the_header() -> None:
    header = (SOURCES / "learn.h").read_text()
    start = header.index("struct Map {\n  int64_t ") + len("struct Map {\n  int64_t ")
    assert header[start : header.index(";", start)].split(", ") == [field[0] for field in Map._fields_]
