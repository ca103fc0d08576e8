"""The benchmarks of memory at small size: what they write, what they watch, and that their rows come to an end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from floyd.pipelines.deepfloyd_if import IFPipeline
from floyd.store import weights

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a process's peak")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gpu_memory
    import bench_int8
    import bench_memory
    import made_up
    import watched

    return SimpleNamespace(gpu=bench_gpu_memory, int8=bench_int8, memory=bench_memory, made_up=made_up, watched=watched)


def test_a_made_up_checkpoint_is_whole_in_half_precision_and_in_shards(bench: Any, tmp_path: Path) -> None:
    first = bench.memory.checkpoints("tiny")[0]["tiny-I"]
    folder = bench.made_up.write_stage(first, tmp_path / "one", bench.made_up.Pool(), shard_bytes=5_000_000)
    shards = sorted(file.name for file in (folder / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"diffusion_pytorch_model.fp16-00001-of-{len(shards):05d}.safetensors"
    state = weights.read(folder / "text_encoder", variant="fp16")
    assert {key for key, tensor in state.items() if tensor.dtype == torch.float32} == {k for k in state if ".wo." in k}
    pipe = IFPipeline.from_pretrained(folder, variant="fp16")
    assert all(torch.isfinite(p).all() for p in pipe.unet.parameters())
    assert 0.9 < pipe.unet.mid_block.resnets[0].conv1.weight.std() * (192 * 9) ** 0.5 < 1.1


@ON_LINUX
def test_a_watched_process_tells_its_peak_and_is_ended_at_a_limit(bench: Any) -> None:
    code = "import time; kept = bytearray(100_000_000); time.sleep(0.3); print('{\"number\": 7}')"
    told = bench.watched.run(["-c", code])
    assert (told["number"], told["is_stopped"]) == (7, None)
    assert 100e6 < told["peak_anonymous_bytes"] < told["peak_bytes"] < 200e6
    code = "import time; kept = bytearray(100_000_000); time.sleep(60)"
    assert bench.watched.run(["-c", code], limit_bytes=50_000_000)["is_stopped"] == "memory"
    assert bench.watched.run(["-c", code], timeout_s=0.2)["is_stopped"] == "time"
    assert bench.watched.run(["-c", "raise SystemExit('no such thing')"])["is_stopped"] == "no such thing"


def test_what_the_incumbent_takes_is_told_as_a_multiple(bench: Any) -> None:
    rows = {
        "large": {"peak_bytes": 10, "is_stopped": None},
        "incumbent": {"peak_bytes": 20, "is_stopped": "memory"},
        "cascade": {"peak_bytes": 5, "is_stopped": None},
    }
    assert bench.memory.compared(rows) == {"incumbent_over_floyd": {"large": 2.0}, "incumbent_is_at_least": True}
    assert bench.memory.line("incumbent", rows["incumbent"]).split() == "incumbent peak more than 0.00 GB".split()


def test_the_same_pictures_are_judged_the_same(bench: Any) -> None:
    from floyd.apps.evaluate import RenderedFirst, evaluate, prompts

    painter = RenderedFirst(SimpleNamespace(sizes=(64,)))  # type: ignore[arg-type]
    answers = evaluate(painter, prompts(8))
    rows = bench.int8.compared(answers, answers)
    assert (rows["judged_the_same"], rows["same_scene"], rows["mean_difference"]) == (1.0, 1.0, 0.0)
    others = bench.int8.compared(answers, answers[1:] + answers[:1])
    assert others["judged_the_same"] < 1 or others["same_scene"] < 1
    assert others["mean_difference"] > 1


def script(name: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments, "--dry"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@ON_LINUX
def test_predicted_and_measured_peaks_agree_whatever_is_loaded(bench: Any, tmp_path: Path) -> None:
    """The same code as at real size, with files of half a gigabyte."""
    told = bench.memory.parsed(["--size", "small", "--rows", "large", "large, exact", "--scratch", str(tmp_path / "x")])
    rows = bench.memory.measured(told)["rows"]
    for row in rows.values():
        assert row["is_stopped"] is None
        assert row["pixels"] == 64
        assert row["predicted_bytes"] == pytest.approx(row["peak_bytes"], rel=0.1)


@pytest.mark.slow
def test_every_row_for_the_card_comes_to_its_end_on_the_device_that_counts(bench: Any, tmp_path: Path) -> None:
    told = bench.gpu.parsed(["--device", "cpu", "--few", "2", "--few-for-budgets", "2", "--scratch", str(tmp_path)])
    figures = bench.gpu.measured(told)
    rows = figures["rows"]
    assert {row["is_stopped"] for row in rows.values()} == {None}
    assert {row["pixels"] for row in rows.values()} == {1024}
    assert rows["floyd, all of it there"]["carried_bytes"] == 0 < rows["floyd, smallest"]["carried_bytes"]
    assert set(figures["times_as_fast"]) == {"model", "sequential", "group"}
    json.dumps(figures)


@pytest.mark.slow
def test_a_cold_start_is_measured_beside_reading() -> None:
    said = script("bench_cold_start", "--tiny", "--rounds", "1", "--dtypes", "float32")
    assert "floyd over reading and casting" in said
