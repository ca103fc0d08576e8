"""A norm, its scale and shift and its activation by the kernels, forth and back, against torch in float64."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engines.networks import NETWORKS, given, network
from torch import Tensor, nn

from floyd.engines import learning
from floyd.engines.learning import quicken
from floyd.engines.native import Kernels
from floyd.errors import EngineError
from floyd.nn.norm import normed
from floyd.runtime.threads import one_thread
from floyd.training.recompute import recompute

CHANNELS, GROUPS = 48, 6
ACTS = (None, nn.GELU(), F.gelu, nn.SiLU(), F.silu)


def quick_norm(channels: int = CHANNELS, groups: int = GROUPS) -> nn.GroupNorm:
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert quicken(nn.ModuleList([norm]))
    return norm


def a_map(dtype: torch.dtype, *, channels: int = CHANNELS, size: tuple[int, int] = (13, 11)) -> Tensor:
    """Far from zero, where a variance taken as a difference of squares would be lost."""
    x_BCHW = (torch.randn(3, channels, *size) + 30).to(dtype)
    return x_BCHW.contiguous(memory_format=torch.channels_last).requires_grad_()


def results(
    norm: nn.GroupNorm, x_BCHW: Tensor, act: Any, film: tuple[Tensor, Tensor] | None, grad_BCHW: Tensor
) -> list[Tensor]:
    """What comes out, and the gradients of all that went in."""
    out_BCHW = normed(norm, x_BCHW, act, film)
    inputs = [x_BCHW, norm.weight, norm.bias, *(film or ())]
    return [out_BCHW, *torch.autograd.grad(out_BCHW, inputs, grad_BCHW.to(out_BCHW.dtype))]


def distance(given_: Tensor, exact: Tensor) -> float:
    return ((given_.double() - exact).norm() / exact.norm()).item()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("act", "has_film", "dtype"), list(itertools.product(ACTS, (False, True), (torch.float32, torch.bfloat16)))
)
def test_it_is_at_least_as_exact_as_torch_forth_and_back(act: Any, has_film: bool, dtype: torch.dtype) -> None:
    norm = quick_norm()
    x_BCHW, grad_BCHW = a_map(dtype), torch.randn(3, CHANNELS, 13, 11).to(dtype)
    film = tuple(torch.randn(3, CHANNELS).to(dtype).requires_grad_() for _ in range(2)) if has_film else None
    quick = results(norm, x_BCHW, act, film, grad_BCHW)
    del vars(norm)["at_once"]
    plain = results(norm, x_BCHW, act, film, grad_BCHW)
    exact = results(
        copy.deepcopy(norm).double(),
        x_BCHW.detach().double().requires_grad_(),
        act,
        None if film is None else tuple(part.detach().double().requires_grad_() for part in film),
        grad_BCHW.double(),
    )
    assert quick[0].is_contiguous(memory_format=torch.channels_last)
    least = 1e-6 if dtype == torch.float32 else 3e-3
    for own, torchs, right in zip(quick, plain, exact, strict=True):
        assert own.dtype == torchs.dtype
        assert distance(own, right) <= max(1.1 * distance(torchs, right), least)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("size", [(1, 1), (1, 130), (40, 40)])
def test_any_number_of_pixels_and_of_threads_gives_the_same(size: tuple[int, int]) -> None:
    norm, x_BCHW = quick_norm(), a_map(torch.bfloat16, size=size)
    grad_BCHW = torch.randn(3, CHANNELS, *size)
    several = results(norm, x_BCHW, nn.GELU(), None, grad_BCHW)
    with one_thread():
        alone = results(norm, x_BCHW, nn.GELU(), None, grad_BCHW)
    assert all(torch.equal(one, other) for one, other in zip(several, alone, strict=True))


@pytest.mark.usefixtures("compiled")
def test_what_the_kernels_do_not_know_is_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the kernels were asked")

    norm, x_BCHW = quick_norm(), a_map(torch.float32)
    narrow = quick_norm(channels=6, groups=3)
    norm_with_hook = quick_norm()
    seen: list[Tensor] = []
    norm_with_hook.register_forward_hook(lambda *told: seen.append(told[2]))
    monkeypatch.setattr(learning._Normed, "apply", refuse)
    normed(norm, x_BCHW, nn.Mish())
    normed(norm, x_BCHW, nn.GELU(approximate="tanh"))
    normed(norm, x_BCHW.contiguous())
    normed(copy.deepcopy(norm).double(), x_BCHW.double())
    normed(narrow, a_map(torch.float32, channels=6))
    normed(norm_with_hook, x_BCHW)
    assert len(seen) == 1
    with pytest.raises(AssertionError, match="were asked"):
        normed(norm, x_BCHW)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_quick_networks_gradients_are_the_networks_own(name: str, recomputes: bool) -> None:
    unet = network(name).requires_grad_(True)
    x_BCHW, text_BLE, labels_B = given(unet)
    quick = copy.deepcopy(unet)
    assert quicken(quick)
    if recomputes:
        recompute(quick)
    for one in (unet, quick):
        one(x_BCHW, 321, text_BLE, labels_B, return_dict=False)[0].square().mean().backward()
    largest = max(p.grad.abs().max() for p in unet.parameters() if p.grad is not None)  # what all rounding begins with
    for (path, own), right in zip(quick.named_parameters(), unet.parameters(), strict=True):
        if right.grad is None:
            assert own.grad is None, path
            continue
        assert own.grad is not None, path
        assert (own.grad - right.grad).abs().max() <= 1e-4 * right.grad.abs().max() + 1e-6 * largest, path


@pytest.mark.usefixtures("compiled")
def test_frozen_norms_hand_their_inputs_gradient_on() -> None:
    norm, x_BCHW = quick_norm().requires_grad_(False), a_map(torch.float32)
    normed(norm, x_BCHW, nn.GELU()).sum().backward()
    assert x_BCHW.grad is not None
    assert norm.weight.grad is None


def test_a_model_without_norms_asks_for_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "kernels", None)
    assert not quicken(nn.Linear(2, 2))


def test_without_a_compiler_training_is_as_it_was_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> Kernels:
        raise EngineError("no C++ compiler was found")

    monkeypatch.setattr(learning, "kernels", none)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16))
    with caplog.at_level(logging.WARNING):
        assert not quicken(model)
    assert "no C++ compiler was found" in caplog.text
    assert model[0].weight.is_contiguous()
    assert "at_once" not in vars(model[1])


@pytest.mark.usefixtures("compiled")
def test_bfloat16_keeps_what_is_no_number() -> None:
    """A loss that is none stops a run; it must not be lost on the way."""
    norm, x_BCHW = quick_norm(), a_map(torch.bfloat16).detach()
    x_BCHW[1, 5, 0, 1] = float("nan")
    out_BCHW = normed(norm, x_BCHW, nn.GELU())
    depth = CHANNELS // GROUPS
    assert out_BCHW[1, :depth].isnan().all()  # the whole group
    assert not out_BCHW[1, depth:].isnan().any()
    assert not out_BCHW[[0, 2]].isnan().any()
