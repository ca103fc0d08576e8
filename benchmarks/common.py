"""What all benchmarks share: the machine they ran on, and where results go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": time.process_time,  # of all threads together: for one thread on a machine that others use as well
}
RESULTS = Path(os.environ.get("FLOYD_RESULTS", Path(__file__).parent / "results"))  # another folder, another machine


def machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "diffusers", "floyd-if")},
    }


def figures_so_far(name: str) -> dict[str, Any]:
    """Of `results/<name>.json`, to be added to: none if another processor's are there, for no table mixes two."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    told = json.loads(path.read_text())
    figures: dict[str, Any] = told["figures"] if told["machine"]["processor"] == machine()["processor"] else {}
    return figures


def write(name: str, figures: Any) -> Path:
    """Figures, machine and time as `results/<name>.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    when = datetime.now(UTC).isoformat(timespec="seconds")
    path.write_text(json.dumps({"when": when, "machine": machine(), "figures": figures}, indent=2) + "\n")
    return path


def summary(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def in_turns(works: Mapping[str, Callable[[], Any]], rounds: int, clock: str = "wall") -> dict[str, list[float]]:
    """Seconds of each piece of work, done in turns (A, B, A, B, ...) after one turn that does not count."""
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            begin = now()
            work()
            if turn:
                seconds[name].append(now() - begin)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], to: str) -> dict[str, float]:
    """How many times as fast as `to`, by medians of one run."""
    base = statistics.median(seconds[to])
    return {name: base / statistics.median(values) for name, values in seconds.items()}
