"""What the command costs as a whole process: time and peak memory of `floyd generate`, and of showing help.

    python benchmarks/bench_command.py [--runs 3]

Goals (two cores): 1024 px under 60 s, 64 px under 10 s, peak memory under 3 GB, help and import under a second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import summary, write

PROMPT = "a large red circle above a small blue square on a white background"


def whole_process(command: list[str]) -> tuple[float, float]:
    """Seconds of wall clock and peak resident GiB of one run."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begin
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{message.decode()}")
    return seconds, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    floyd = str(Path(sys.executable).parent / "floyd")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "picture.png")
        commands = {
            "import floyd": [sys.executable, "-c", "import floyd"],
            "floyd --help": [floyd, "--help"],
            **{
                f"{size} px": [floyd, "generate", PROMPT, "-o", picture, "--size", str(size)]
                for size in (64, 256, 1024)
            },
        }
        for name, command in commands.items():
            seconds, gib = zip(*(whole_process(command) for _ in range(runs)), strict=True)
            figures[name] = {"seconds": summary(seconds), "peak_gib": summary(gib)}
            print(f"{name:14}  {figures[name]['seconds']['median']:6.2f} s   {max(gib):5.2f} GiB")
    print(write("command", figures))


if __name__ == "__main__":
    main()
