"""A piece of work in a process of its own, whose memory is watched from outside.

Linux tells what a process has of main memory as VmRSS: RssAnon, what it has made, and RssFile, pages of files that it
has mapped, weights among them. The system may drop the latter when memory is short, but they are counted here all the
same. VmHWM is the largest VmRSS that there has been.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

ROWS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
_EVERY_S = 0.05
RESERVE_BYTES = 1_000_000_000  # the machine's, below which a watched process is ended


def status(pid: int | str = "self") -> dict[str, int]:
    """In bytes; empty for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    rows = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(rows[name].split()[0]) * 1024 for name in ROWS if name in rows}


def available() -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024


def run(arguments: Sequence[str], *, limit_bytes: int | None = None, timeout_s: float = 3600) -> dict[str, Any]:
    """What `python ARGUMENTS` writes as the last line of its output, as JSON, and the most memory it had.

    `is_stopped` says why it did not come to its end: "memory" where it took more than `limit_bytes` or left the machine
    too little, "time", or the last line of its complaint.
    """
    peaks = dict.fromkeys(ROWS, 0)
    stopped: str | None = None
    begin = time.perf_counter()
    with TemporaryFile() as out, TemporaryFile() as err:
        child = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err)
        while child.poll() is None:
            for name, size in status(child.pid).items():
                peaks[name] = max(peaks[name], size)
            if limit_bytes is not None and (peaks["VmRSS"] > limit_bytes or available() < RESERVE_BYTES):
                stopped = "memory"
            elif time.perf_counter() - begin > timeout_s:
                stopped = "time"
            if stopped is not None:
                child.kill()
                break
            time.sleep(_EVERY_S)
        child.wait()
        seconds = time.perf_counter() - begin
        said, complaint = (_last_line(file) for file in (out, err))
    if stopped is None and child.returncode:
        stopped = complaint or f"exit status {child.returncode}"
    told = {} if stopped is not None or not said else json.loads(said)
    return {**told, "peak_bytes": peaks["VmHWM"], "peak_anonymous_bytes": peaks["RssAnon"],
            "process_seconds": seconds, "is_stopped": stopped}  # fmt: skip


def _last_line(file: Any) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return str(lines[-1]) if lines else ""
