from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from floyd.training.loop import LoopConfig, Losses, Phase, Trainer
from floyd.training.workers import ALONE, Share, launched


def test_pieces_of_shares_are_all_rows_once() -> None:
    rows = list(range(12))
    parts = [rows[Share(worker, 2).within(piece, 3).rows] for worker in range(2) for piece in range(3)]
    assert sorted(row for part in parts for row in part) == rows
    assert {len(part) for part in parts} == {2}


def test_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() is ALONE


def test_processes_without_accelerate_are_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"needs accelerate.*floyd-if\[train\]"):
        launched()


def loss_of(
    model: nn.Module, phase: Phase, step: int, generator: torch.Generator, *, share: Share | None = None
) -> Losses:
    x = torch.randn(phase.batch_size, 4, generator=generator)
    x = x if share is None else x[share.rows]
    return {"copy": (model(x) - x).square().mean(), "small": 0.1 * model(x).abs().mean()}


def trained(folder: Path, accumulate: int) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    phase = Phase(num_steps=5, batch_size=12, size=1, rate=1e-2, last_rate=1e-2)
    config = LoopConfig(phases=(phase,), accumulate=accumulate, precision="fp32")
    return [sum(made.losses.values()) for made in Trainer(model, loss_of, config, folder).run()], model


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_a_batch_in_pieces_teaches_what_it_teaches_whole(tmp_path: Path, accumulate: int) -> None:
    losses, model = trained(tmp_path / "whole", 1)
    same_losses, same = trained(tmp_path / "pieces", accumulate)
    assert same_losses == pytest.approx(losses, rel=1e-5)
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_batch_that_cannot_be_cut_evenly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 12 cannot be cut into 5 equal pieces"):
        trained(tmp_path, 5)


SCRIPT = """
import json, os, sys
from floyd.apps.tuning.config import TuneConfig
from floyd.apps.tuning.run import Run
run = Run(TuneConfig.of(**json.loads(sys.argv[1])))
losses = [moment.losses for moment in run.moments() if moment.label == "training"]
print(json.dumps([run.workers.share.count, losses]))
"""


def processes(count: int, told: dict[str, object]) -> list[list[dict[str, float]]]:
    """The losses that each of so many processes on this machine tells."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        launch = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "ACCELERATE_USE_CPU": "true"}
        environment = {**os.environ, **{key: str(value) for key, value in {**launch, **address}.items()}}
        command = [sys.executable, "-c", SCRIPT, json.dumps(told)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    answers = [process.communicate(timeout=900) for process in started]
    assert [process.returncode for process in started] == [0] * count, answers[-1][1].decode()[-2000:]
    told_by = [json.loads(out.decode().splitlines()[-1]) for out, _ in answers]
    assert {number for number, _ in told_by} == {count}
    return [losses for _, losses in told_by]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dreambooth"])
def test_two_processes_learn_what_one_learns(method: str, tmp_path: Path) -> None:
    """DistributedDataParallel over gloo, on the built-in model, with the same batch in all."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (70, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"a red circle {i}")
    told: dict[str, object] = {"data": str(data), "steps": 5, "batch": 4, "precision": "fp32", "device": "cpu"}
    told |= {"rate": 1e-3, "flip": True, "method": method}
    if method == "dreambooth":
        told["class_data"] = str(data)
    (one,) = processes(1, {**told, "out": str(tmp_path / "one")})
    first, second = processes(2, {**told, "out": str(tmp_path / "two"), "accumulate": 2})
    assert first == second, "every process tells the mean over all"
    for step, (alone, together) in enumerate(zip(one, first, strict=True)):
        assert together == pytest.approx(alone, rel=2e-3), step
    files = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("one", "two")]
    from floyd.store.weights import read_file

    before, after = map(read_file, files)
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=1e-2, atol=1e-3)
