from __future__ import annotations

import pytest
import torch
from torch import nn

from floyd.training.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_all_singular_values_are_driven_towards_one(shape: tuple[int, int]) -> None:
    matrix_MN = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, after = (torch.linalg.svdvals(m.float()) for m in (matrix_MN, orthogonalized(matrix_MN)))
    assert float(before.max() / before.min()) > 2
    assert float(after.min()) > 0.5
    assert float(after.max()) < 1.4


def test_the_singular_vectors_stay() -> None:
    matrix_MN = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix_MN)
    inner = u.T @ orthogonalized(matrix_MN) @ v.T
    assert float((inner - inner.diagonal().diag()).abs().max()) < 0.05  # bfloat16
    assert (inner.diagonal() > 0).all()


def test_an_update_is_as_large_as_adamws() -> None:
    p = nn.Parameter(torch.zeros(64, 32))
    p.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    Muon([p], lr=1.0).step()
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.3)


def test_kernels_are_matrices_of_their_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(8, 2, 3, 3, generator=generator)
    kernel, matrix = nn.Parameter(torch.zeros(8, 2, 3, 3)), nn.Parameter(torch.zeros(8, 18))
    kernel.grad, matrix.grad = gradient, gradient.flatten(1)
    Muon([kernel, matrix], lr=0.1).step()
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


def test_weights_decay_by_the_rate_times_the_decay() -> None:
    p = nn.Parameter(torch.full((2, 2), 3.0))
    p.grad = torch.zeros(2, 2)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 3.0 * (1 - 0.05)))
