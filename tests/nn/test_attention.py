"""Attention in pieces is attention."""

from __future__ import annotations

import pytest
import torch

from floyd.nn.attention import fitting


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
