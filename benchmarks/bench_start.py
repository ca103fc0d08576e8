"""From nothing to the first step of the built-in stage I: whole processes, floyd's and diffusers', in turns.

    python benchmarks/bench_start.py [--runs 5]

A process imports, loads the checkpoint, reads the prompt, makes one guided step, tells that it has, and ends. Files are
in the machine's memory by then: a run that does not count precedes. floyd's modules are compiled to bytecode before, as
pip does with all packages that it installs, while floyd may run from its sources here. "torch alone" is the floor.
"""

from __future__ import annotations

import argparse
import compileall
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from itertools import product
from typing import Any

from common import summary, write
from pairs import BUILT_IN

TELL = "import os; os.write(1, b'.')"  # when the step is done: what follows is Python's clearing up
STEP = f"""
positive, negative = pipe.encode_prompt("a large red circle above a small blue square")
text = {{"prompt_embeds": positive, "negative_prompt_embeds": negative}}
pipe(**text, num_inference_steps=1, output_type="pt")
{TELL}"""
PROCESSES = {
    "torch alone": f"import torch\n{TELL}",
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


def timed(code: str) -> dict[str, float]:
    """Seconds to the step's end and to the process's, and of processor time."""
    with tempfile.TemporaryFile() as messages:
        begin = time.monotonic()
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=messages)
        assert process.stdout is not None
        process.stdout.read(1)
        step = time.monotonic() - begin
        _, status, usage = os.wait4(process.pid, 0)
        whole = time.monotonic() - begin
        if status != 0:
            messages.seek(0)
            raise SystemExit(f"A process failed:\n{messages.read().decode()}")
    return {"step": step, "whole": whole, "cpu": usage.ru_utime + usage.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    compileall.compile_dir(files("floyd"), quiet=1)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in PROCESSES}
    for turn in range(runs + 1):
        for name, code in PROCESSES.items():
            took = timed(code)
            if turn:
                seconds[name].append(took)
    rows: dict[str, Any] = {name: {} for name in PROCESSES}
    for name, what in product(PROCESSES, ("step", "whole", "cpu")):
        own, theirs = ([took[what] for took in seconds[it]] for it in (name, "diffusers"))
        rows[name][what] = {"ratio": statistics.median(theirs) / statistics.median(own), **summary(own)}
    for name, row in rows.items():
        told = (f"{what} {it['median']:6.2f} s {it['ratio']:5.2f}x" for what, it in row.items())
        print(f"{name:12} {', '.join(told)}")
    print(write("start", rows))


if __name__ == "__main__":
    main()
