"""Main memory at real size: what floyd's plans say and take, and what the incumbent takes.

    python benchmarks/bench_memory.py [--size real|tenth|small|tiny] [--rows ...] [--steps 2] [--scratch FOLDER]

Random weights in half precision, in shards, in the hub's layout. Each row is a process of its own, from its start to a
picture on the CPU, and its peak is VmHWM: all that it has of main memory, pages of mapped files included.

    large            IF-I-XL with T5-XXL, a prompt to 64 px, memory=Budget(vram=0, ram="12GB")
    large, exact     the same without quantization: bfloat16
    incumbent        the same by diffusers in bfloat16, which it loads with low_cpu_mem_usage
    cascade          IF-I-M, IF-II-M and x4 to 1024 px with T5-XXL, memory=Budget(vram=0, ram="8GB")

At real size this writes 25 GB, and takes 12 GB of main memory, the incumbent as much as --limit allows: past it the
process is ended, and the row says "more than". `predicted` is the plan's own figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import made_up
import watched
from common import write
from made_up import Stage

PROMPT = "a large red circle above a small blue square on a white background"
TINY_T5 = made_up.t5(d_model=128, d_ff=256, d_kv=32, num_heads=4, num_layers=2, vocab_size=256)
SMALL_T5 = made_up.t5(d_model=1024, d_ff=2816, num_heads=16, num_layers=12)
SMALL_UNET = made_up.narrow("IF-I-M", block_out_channels=(128, 256, 384, 512), encoder_hid_dim=1024,
                            cross_attention_dim=512)  # fmt: skip
TENTH_T5 = made_up.t5(d_model=2048, d_ff=5120, num_heads=32, num_layers=10)

# Sizes: the large pipeline's stages, the cascade's, and the budgets for them in bytes.
Checkpoints = tuple[dict[str, Stage], dict[str, Stage], int, int]


def checkpoints(size: str) -> Checkpoints:
    if size == "real":
        large = {"IF-I-XL": made_up.cascade("IF-I-XL", "IF-II-M")["IF-I-XL"]}
        return large, made_up.cascade("IF-I-M", "IF-II-M"), 12 * 10**9, 8 * 10**9
    if size == "tenth":
        narrow = made_up.narrow("IF-I-L", encoder_hid_dim=TENTH_T5["d_model"])
        return {"IF-I-L": Stage(like="stage_1", unet=narrow, text_encoder=TENTH_T5)}, {}, 4 * 10**9, 0
    if size == "small":
        small = Stage(like="stage_1", unet=SMALL_UNET, text_encoder=SMALL_T5)
        return {"small": small}, {}, 3 * 10**9, 0
    first = Stage(like="stage_1", unet=read_mini("stage_1", "unet"), text_encoder=TINY_T5)
    second = Stage(like="stage_2", unet=read_mini("stage_2", "unet"))
    third = Stage(like="stage_3", unet=read_mini("stage_3", "unet"), vae=read_mini("stage_3", "vae"),
                  text_encoder=_text_keys(read_mini("stage_3", "text_encoder")))  # fmt: skip
    return {"tiny-I": first}, {"tiny-I": first, "tiny-II": second, "tiny-III": third}, 3 * 10**9, 4 * 10**9


def read_mini(stage: str, component: str) -> dict[str, Any]:
    content = json.loads((made_up.MINI / stage / component / "config.json").read_text())
    return {key: value for key, value in content.items() if not key.startswith("_")}


def _text_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key in {*made_up.CLIP, "max_position_embeddings"}}


# --------------------------------------------------------------------------------------------- in a process of its own


def floyd_row(folders: Sequence[str], budget: int, steps: int, *, exact: bool) -> dict[str, Any]:
    from floyd import Cascade
    from floyd.runtime.budget import Budget

    begin = time.perf_counter()
    memory = Budget(vram=0, ram=budget, quantize=not exact)
    cascade = Cascade.from_pretrained(*folders, variant=made_up.VARIANT, memory=memory)
    loaded = time.perf_counter()
    image = cascade(PROMPT, steps=steps).images[0]
    assert cascade.memory is not None, "it was asked for"
    plan = cascade.memory.plan
    parts = {c.part: f"{c.precision}{'' if c.is_kept else ', read for each use'}" for c in plan.choices}
    return {"predicted_bytes": plan.ram_peak, "parts": parts, "pixels": image.size[0],
            "load_seconds": loaded - begin, "seconds": time.perf_counter() - begin}  # fmt: skip


def incumbent_row(folder: str, steps: int) -> dict[str, Any]:
    import torch
    from diffusers import IFPipeline

    begin = time.perf_counter()
    told: dict[str, Any] = {"torch_dtype": torch.bfloat16, "variant": made_up.VARIANT, "low_cpu_mem_usage": True}
    pipe = IFPipeline.from_pretrained(folder, **told)
    loaded = time.perf_counter()
    image = pipe(PROMPT, num_inference_steps=steps).images[0]
    return {"pixels": image.size[0], "load_seconds": loaded - begin, "seconds": time.perf_counter() - begin}


# ------------------------------------------------------------------------------------------------------------- the rows


def measured(told: argparse.Namespace) -> dict[str, Any]:
    large, cascade, large_budget, cascade_budget = checkpoints(told.size)
    scratch = Path(told.scratch or mkdtemp(prefix="floyd-memory-"))
    pool, figures = made_up.Pool(), dict[str, Any]()

    def row(name: str, *arguments: str) -> None:
        if name in told.rows:
            command = [__file__, "--size", told.size, "--steps", str(told.steps), "--child", *arguments]
            figures[name] = watched.run(command, limit_bytes=int(told.limit * 1e9), timeout_s=told.timeout)
            print(line(name, figures[name]), flush=True)

    try:
        if {"large", "large, exact", "incumbent"} & set(told.rows):
            folders = written(large, scratch, pool)
            row("large", "floyd", str(large_budget), *folders)
            row("large, exact", "floyd-exact", str(large_budget), *folders)
            row("incumbent", "incumbent", "0", *folders)
            shutil.rmtree(folders[0])
        if "cascade" in told.rows and cascade:
            row("cascade", "floyd", str(cascade_budget), *written(cascade, scratch, pool))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"size": told.size, "steps": told.steps, "rows": figures, **compared(figures)}


def written(stages: Mapping[str, Stage], root: Path, pool: made_up.Pool) -> list[str]:
    begin = time.perf_counter()
    folders = [made_up.write_stage(stage, root / name, pool) for name, stage in stages.items()]
    size = sum(map(made_up.bytes_in, folders)) / 1e9
    print(f"{', '.join(stages)}: {size:.2f} GB written in {time.perf_counter() - begin:.0f} s", flush=True)
    return [str(folder) for folder in folders]


def compared(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The incumbent's peak as a multiple of floyd's; at least so much where it was ended."""
    theirs = figures.get("incumbent")
    if theirs is None:
        return {}
    ended = theirs["is_stopped"] == "memory"
    whole = [name for name, row in figures.items() if name.startswith("large") and row["is_stopped"] is None]
    ratios = {name: theirs["peak_bytes"] / figures[name]["peak_bytes"] for name in whole}
    return {"incumbent_over_floyd": ratios, "incumbent_is_at_least": ended}


def line(name: str, row: Mapping[str, Any]) -> str:
    more = "more than " if row["is_stopped"] == "memory" else ""
    said = f"{name:14} peak {more}{row['peak_bytes'] / 1e9:.2f} GB"
    if "predicted_bytes" in row:
        off = row["predicted_bytes"] / row["peak_bytes"] - 1
        said += f", predicted {row['predicted_bytes'] / 1e9:.2f} ({off:+.1%})"
    if "seconds" in row:
        said += f", {row['load_seconds']:.1f} s to load, {row['seconds']:.1f} s in all"
    return said if row["is_stopped"] in (None, "memory") else f"{said}; stopped: {row['is_stopped']}"


ROWS = ("large", "large, exact", "incumbent", "cascade")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["real", "tenth", "small", "tiny"], default="real")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--limit", type=float, default=20, help="GB of main memory past which a process is ended")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each row")
    parser.add_argument("--scratch", help="a folder for the files, which is removed in the end")
    parser.add_argument("--dry", action="store_true", help="write no results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    told = parsed()
    if told.child is not None:
        kind, budget, *folders = told.child
        if kind == "incumbent":
            print(json.dumps(incumbent_row(folders[0], told.steps)))
        else:
            print(json.dumps(floyd_row(folders, int(budget), told.steps, exact=kind == "floyd-exact")))
        return
    figures = measured(told)
    if not told.dry:
        print(write("memory" if told.size == "real" else f"memory_{told.size}", figures))


if __name__ == "__main__":
    main()
