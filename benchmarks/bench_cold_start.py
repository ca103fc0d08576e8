"""From the call of from_pretrained to the end of the first step, the files being in the page cache.

    python benchmarks/bench_cold_start.py [--unet IF-I-M] [--layers 6] [--rounds 5] [--dtypes float32 bfloat16]

A stage I of real width with a T5 of fewer layers, random weights in half precision, in shards. Each time is a process
of its own, which has imported what it needs and run the built-in cascade once; floyd and the incumbent take turns with
two readers of the same files:

    read         every file into memory, byte by byte: nothing less brings weights from the page cache to a process
    read, cast   every tensor into memory in the precision that was asked for, by safetensors and torch alone

Before it is timed, every process touches three times as much memory as the files are long, and gives it back: in a
virtual machine, memory that was not touched lately is the host's, and getting it takes longer than all the rest.

A start counts from `from_pretrained` to the end of the first step of a call, without what the same step takes later: so
it holds the building of the networks, all reading and casting, and the pages that are first touched while computing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import made_up
import watched
from bench_memory import checkpoints
from common import summary, write
from made_up import Stage

GOAL = 1.2
PROMPT = "a large red circle above a small blue square on a white background"
TOUCHED = 3  # times the bytes of the files: weights in twice the precision, and their copies
READERS = ("read", "read, cast")
SIDES = ("floyd", "incumbent")


# --------------------------------------------------------------------------------------------- in a process of its own


def read(folder: Path, dtype: Any) -> list[Any]:
    import torch

    kept = []
    for file in sorted(folder.rglob("*.safetensors")):
        content = torch.empty(file.stat().st_size, dtype=torch.uint8)
        with file.open("rb", buffering=0) as opened:
            view = content.numpy().data
            while len(view) and (count := opened.readinto(view)):
                view = view[count:]
        kept.append(content)
    return kept


def read_cast(folder: Path, dtype: Any) -> list[Any]:
    from safetensors import safe_open

    kept = []
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            kept += [opened.get_tensor(key).to(dtype, copy=True) for key in opened.keys()]  # noqa: SIM118
    return kept


def touch(num_bytes: int) -> None:
    """Have the host give memory, as much as is there."""
    import torch

    torch.empty(min(num_bytes, watched.available() * 3 // 4), dtype=torch.uint8).fill_(1)


def started(pipeline: Any, folder: Path, **told: Any) -> float:
    """Seconds until the first step is done, less those of the same step later."""
    times: list[float] = []

    def first_step_of(pipe: Any) -> float:
        begin = time.perf_counter()
        times.clear()
        pipe(PROMPT, num_inference_steps=2, callback=lambda *_: times.append(time.perf_counter()), callback_steps=1)
        return times[0] - begin

    begin = time.perf_counter()
    pipe = pipeline.from_pretrained(folder, **told)
    loaded = time.perf_counter() - begin
    pipe.set_progress_bar_config(disable=True)
    cold = first_step_of(pipe)
    return loaded + cold - min(first_step_of(pipe) for _ in range(2))


def side(name: str) -> Any:
    if name == "floyd":
        from floyd import IFPipeline

        return IFPipeline
    from diffusers import IFPipeline as Incumbent

    return Incumbent


def child(name: str, folder: Path, dtype_name: str) -> dict[str, float]:
    import torch

    dtype, reader = getattr(torch, dtype_name), {"read": read, "read, cast": read_cast}.get(name)
    if reader is not None:
        torch.ones(2**22, dtype=torch.float16).to(dtype)
        touch(TOUCHED * made_up.bytes_in(folder))
        begin = time.perf_counter()
        kept = reader(folder, dtype)
        seconds = time.perf_counter() - begin
        assert kept, "there are files"
        return {"seconds": seconds}
    pipeline = side(name)
    started(pipeline, made_up.MINI / "stage_1", torch_dtype=dtype)  # whatever is imported on the way
    touch(TOUCHED * made_up.bytes_in(folder))
    return {"seconds": started(pipeline, folder, torch_dtype=dtype, variant=made_up.VARIANT)}


# ------------------------------------------------------------------------------------------------------------- the rows


def measured(told: argparse.Namespace) -> dict[str, Any]:
    scratch = Path(told.scratch or mkdtemp(prefix="floyd-cold-"))
    stage = Stage(like="stage_1", unet=made_up.PRESETS[told.unet], text_encoder=made_up.t5(num_layers=told.layers))
    if told.tiny:
        stage = checkpoints("tiny")[0]["tiny-I"]
    try:
        folder = made_up.write_stage(stage, scratch / "one", made_up.Pool())
        size = made_up.bytes_in(folder)
        print(f"{size / 1e9:.2f} GB of weights", flush=True)
        return {"bytes": size, "unet": told.unet, "layers": told.layers,
                "dtypes": {dtype: in_turns(folder, dtype, told.rounds) for dtype in told.dtypes}}  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def in_turns(folder: Path, dtype: str, rounds: int) -> dict[str, Any]:
    """One turn that does not count brings the files into the page cache."""
    seconds: dict[str, list[float]] = {name: [] for name in (*READERS, *SIDES)}
    for turn in range(rounds + 1):
        for name in seconds:
            told = watched.run([__file__, "--child", name, str(folder), dtype])
            if told["is_stopped"] is not None:
                raise SystemExit(f"{name} in {dtype}: {told['is_stopped']}")
            if turn:
                seconds[name].append(told["seconds"])
    rows = compared(seconds)
    for name, value in rows["over_read"].items():
        print(f"{dtype:9} {name:11} {rows['seconds'][name]['median']:7.2f} s   {value:5.2f} times reading", flush=True)
    print(f"{dtype:9} floyd over reading and casting: {rows['over_read_cast']['floyd']:.2f}, goal {GOAL}", flush=True)
    return rows


def compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    medians: dict[str, float] = {name: statistics.median(own) for name, own in seconds.items()}
    return {
        "seconds": {name: summary(own) for name, own in seconds.items()},
        "over_read": {name: median / medians["read"] for name, median in medians.items()},
        "over_read_cast": {name: median / medians["read, cast"] for name, median in medians.items()},
        "incumbent_over_floyd": medians["incumbent"] / medians["floyd"],
    }


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", choices=["IF-I-M", "IF-I-L", "IF-I-XL"], default="IF-I-M")
    parser.add_argument("--layers", type=int, default=6, help="of T5, 0.4 GB each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tiny", action="store_true", help="a network of a few megabytes, to try the command")
    parser.add_argument("--scratch", help="a folder for the files, which is removed in the end")
    parser.add_argument("--dry", action="store_true", help="write no results")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    told = parsed()
    if told.child is not None:
        name, folder, dtype = told.child
        print(json.dumps(child(name, Path(folder), dtype)))
        return
    figures = measured(told)
    if not told.dry:
        print(write("cold_start", figures))


if __name__ == "__main__":
    main()
