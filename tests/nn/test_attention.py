"""Attention in pieces is attention, and so is what it goes back by in training."""

from __future__ import annotations

import pytest
import torch

from floyd.nn import attention
from floyd.nn.attention import attended, fitting


@pytest.mark.parametrize("most", [1, 2 * 3 * 11 * 4, 2 * 3 * 11 * 7, 10**9])
@pytest.mark.parametrize("has_bias", [False, True])
def test_however_many_scores_are_held_at_once_the_answer_is_the_same(
    most: int, has_bias: bool, generator: torch.Generator
) -> None:
    q, k, v = (torch.randn(2, 3, length, 8, generator=generator) for length in (7, 11, 11))
    bias = torch.randn(2, 1, 1, 11, generator=generator) if has_bias else None
    torch.testing.assert_close(fitting(q, k, v, bias, most=most), fitting(q, k, v, bias), atol=1e-6, rtol=0)


def test_a_device_that_writes_scores_down_is_never_asked_for_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
        asked.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return torch.zeros(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    q = torch.zeros(1, 2, 50, 4)
    assert fitting(q, q, q, most=1000).shape == q.shape
    assert sum(asked) == 2 * 50 * 50
    assert max(asked) <= 1000


def _trained(pixels: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[list[torch.Tensor], int]:
    """The output and the gradients, and the largest tensor that was kept for the way back."""
    q, k, v = (
        torch.randn(1, 2, length, 8, generator=generator).to(dtype).requires_grad_() for length in (pixels, 90, 90)
    )
    bias = torch.randn(1, 1, 1, 90, generator=generator).to(dtype)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        out = attended(q, k, v, bias)
    out.backward(torch.randn(out.shape, generator=generator).to(dtype))
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)], max(kept)


@pytest.mark.parametrize("is_written_out", [True, False])
def test_both_ways_back_are_those_of_attention(is_written_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MOST_WRITTEN_OUT", 2**25 if is_written_out else 0)
    own, kept = _trained(70, torch.bfloat16, torch.Generator().manual_seed(0))
    exact, _ = _trained(70, torch.float32, torch.Generator().manual_seed(0))
    assert len(own) == len(exact) == 4
    for one, other in zip(own, exact, strict=True):
        torch.testing.assert_close(one.float(), other, atol=0.05, rtol=0.05)
    assert (kept >= 2 * 70 * 90) == is_written_out, "whether scores are kept"


def test_training_in_float32_keeps_no_scores(generator: torch.Generator) -> None:
    _, kept = _trained(300, torch.float32, generator)
    assert kept < 2 * 300 * 90
