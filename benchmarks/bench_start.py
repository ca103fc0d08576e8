"""From nothing to the first step of the built-in stage I: whole processes, floyd's and diffusers', in turns.

    python benchmarks/bench_start.py [--runs 5]

A process imports, loads the checkpoint, reads the prompt, and ends after one guided step. Files are in the machine's
memory by then: a run that does not count precedes. "torch alone" is what neither can go below.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from common import summary, write
from pairs import BUILT_IN

STEP = """
positive, negative = pipe.encode_prompt("a large red circle above a small blue square")
text = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
pipe(**text, num_inference_steps=1, output_type="pt")
"""
PROCESSES = {
    "torch alone": "import torch",
    "diffusers": f"""
import torch
from diffusers import IFPipeline
pipe = IFPipeline.from_pretrained({str(BUILT_IN["mini-1"])!r}, dtype=torch.float32)
{STEP}""",
    "floyd": f"""
from floyd import IFPipeline
pipe = IFPipeline.from_pretrained({str(BUILT_IN["mini-1"])!r})
{STEP}""",
}


def whole_process(code: str) -> tuple[float, float]:
    """Seconds of wall clock and of processor time."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"A process failed:\n{message.decode()}")
    return time.monotonic() - begin, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    wall: dict[str, list[float]] = {name: [] for name in PROCESSES}
    cpu: dict[str, list[float]] = {name: [] for name in PROCESSES}
    for turn in range(runs + 1):
        for name, code in PROCESSES.items():
            seconds = whole_process(code)
            if turn:
                wall[name].append(seconds[0])
                cpu[name].append(seconds[1])
    rows: dict[str, Any] = {}
    for name in PROCESSES:
        ratio, ratio_cpu = (
            statistics.median(times["diffusers"]) / statistics.median(times[name]) for times in (wall, cpu)
        )
        rows[name] = {"ratio": ratio, "ratio_cpu": ratio_cpu, "cpu": summary(cpu[name]), **summary(wall[name])}
        print(f"{name:12} {rows[name]['median']:6.2f} s  {ratio:5.2f}x  (processor time {ratio_cpu:5.2f}x)")
    print(write("start", rows))


if __name__ == "__main__":
    main()
