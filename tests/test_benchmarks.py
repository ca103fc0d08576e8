"""The GPU's benchmark runs where there is no GPU, at small size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_gpus_benchmark_runs_at_small_size() -> None:
    command = [sys.executable, "benchmarks/bench_gpu.py", *"--device cpu --size tiny --minutes 0.6".split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT / "src"), *sys.path) if p)}
    told = subprocess.run([*command, "--repeats", "1"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    for row in ("IF-I-XL", "IF-II-L", "x4-upscaler", "VAE", "T5", "picture", "IF-I-XL, 16 prompts"):
        assert f"\n{row}: floor" in told.stdout, f"{row} is missing or failed:\n{told.stdout}"
    assert "Error" not in told.stdout
