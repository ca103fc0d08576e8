from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from floyd.training import muon, precision
from floyd.training.loop import LoopConfig, Losses, Phase, Trainer
from floyd.training.muon import orthogonalized
from floyd.training.precision import chosen, computes_in_bfloat16

CPU = torch.device("cpu")
PHASE = Phase(num_steps=2, batch_size=2, size=0, rate=1e-3, last_rate=1e-3)


def test_what_was_asked_for_is_taken() -> None:
    assert [chosen(name, CPU) for name in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_auto_is_what_the_processor_says_of_itself() -> None:
    told = getattr(torch.cpu, "get_capabilities", dict)()
    if told.get("architecture") != "x86_64":
        pytest.skip("this torch does not tell what the processor can do")
    expected = told["avx512_bf16"] or told["amx_bf16"] or (told["avx_ne_convert"] and not told["avx512_f"])
    assert computes_in_bfloat16(CPU) == expected
    assert chosen("auto", CPU) == ("bf16" if expected else "fp32")


@pytest.mark.parametrize(
    ("onednn", "avx512", "bf16", "amx", "expected"),
    [
        (True, True, True, False, True),  # Zen 4
        (True, True, False, True, True),
        (True, True, True, True, True),  # Sapphire Rapids
        (True, True, False, False, False),  # Skylake, Ice Lake: emulated
        (True, False, False, False, True),  # ARM with its own instructions
        (False, False, False, False, False),  # Zen 3 and before
    ],
)
def test_emulated_bfloat16_does_not_count(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, avx512: bool, bf16: bool, amx: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    for name, value in (("avx512", avx512), ("avx512_bf16", bf16), ("amx_tile", amx)):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda value=value: value)
    assert precision._cpu_does.__wrapped__() == expected


@pytest.mark.parametrize("is_fast", [True, False])
def test_auto_decides_in_what_the_network_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_fast: bool
) -> None:
    monkeypatch.setattr(precision, "computes_in_bfloat16", lambda device: is_fast)
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

    monkeypatch.setattr(muon, "computes_in_bfloat16", lambda device: False)
    assert astray() < 1e-5
    monkeypatch.setattr(muon, "computes_in_bfloat16", lambda device: True)
    assert astray() > 1e-4
