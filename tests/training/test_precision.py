from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from floyd.runtime.machine import computes_in
from floyd.training import muon, precision
from floyd.training.loop import LoopConfig, Losses, Phase, Trainer
from floyd.training.muon import orthogonalized
from floyd.training.precision import chosen

CPU = torch.device("cpu")
PHASE = Phase(num_steps=2, batch_size=2, size=0, rate=1e-3, last_rate=1e-3)


def test_what_was_asked_for_is_taken() -> None:
    assert [chosen(name, CPU) for name in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_auto_is_what_the_device_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("auto", CPU) == ("bf16" if computes_in(torch.bfloat16, CPU) else "fp32")
    for is_fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "computes_in", lambda dtype, device, is_fast=is_fast: is_fast)
        assert chosen("auto", CPU) == expected


@pytest.mark.parametrize("is_fast", [True, False])
def test_auto_decides_in_what_the_network_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_fast: bool
) -> None:
    monkeypatch.setattr(precision, "computes_in", lambda dtype, device: is_fast)
    dtypes = []

    def loss_of(model: nn.Module, phase: Phase, step: int, generator: torch.Generator) -> Losses:
        out_BC = model(torch.randn(phase.batch_size, 4, generator=generator))
        dtypes.append(out_BC.dtype)
        return {"small": out_BC.float().square().mean()}

    list(Trainer(nn.Linear(4, 4), loss_of, LoopConfig(phases=(PHASE,)), tmp_path).run())
    assert dtypes == [torch.bfloat16 if is_fast else torch.float32] * 2


def test_without_bfloat16_an_update_is_made_orthogonal_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix_MN = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    u_MM, _, vh_MN = torch.linalg.svd(matrix_MN, full_matrices=False)

    def astray() -> float:
        inner_MM = u_MM.T @ orthogonalized(matrix_MN) @ vh_MN.T
        return float((inner_MM - inner_MM.diagonal().diag()).abs().max())

    monkeypatch.setattr(muon, "computes_in", lambda dtype, device: False)
    assert astray() < 1e-5
    monkeypatch.setattr(muon, "computes_in", lambda dtype, device: True)
    assert astray() > 1e-4
