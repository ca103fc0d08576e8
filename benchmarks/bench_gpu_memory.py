"""The whole cascade on a card of which it may use 14, 8, 6 or 4 GB, beside all of it there; and diffusers' offloading.

    python benchmarks/bench_gpu_memory.py [--part budgets|incumbent] [--seconds 570] [--budgets 14GB 8GB ...]
    python benchmarks/bench_gpu_memory.py --device cpu --size tiny

IF-I-XL, IF-II-L and x4 to 1024 px in bfloat16, random weights in half precision from files, all steps that the
checkpoints are called with. Every row is a process of its own with the time that is left: one that fails, or has no
time, says so and harms no other. `peak` is the allocator's. With --part incumbent each of diffusers' ways to offload is
beside floyd at a budget of the same peak, both with --few steps in each stage. --scratch names a folder where the
files are looked for and, with --keep, left for the next call.

Without a card a tiny cascade goes the same way: the plan is that of a card, and what streams goes through the device
that counts the bytes it carries; the incumbent is not offloaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import made_up
import torch
import watched
from bench_memory import PROMPT, checkpoints
from common import write

WHOLE, SMALLEST = "whole", "smallest"
GOALS = {"14GB": 1.1, "8GB": 1.3, "6GB": 1.6}  # at most so many times as long as with all of it there
FASTER = {"model": 2.0, "sequential": 10.0, "group": 2.0}  # at least so many times as fast as the incumbent
BUDGETS = {"real": ["14GB", "8GB", "6GB", "4GB"], "tiny": ["1GB", SMALLEST]}


# --------------------------------------------------------------------------------------------- in a process of its own


@dataclass(frozen=True)
class Card:
    """What measures: CUDA's clock and allocator, or the device that counts bytes."""

    is_real: bool
    counting: Any = None

    @classmethod
    def of(cls, device: str) -> Card:
        """On the CPU, whatever asks for a card from now on is told of one that is not there."""
        if device == "cuda":
            return cls(is_real=True)
        from floyd.pipelines import memory
        from floyd.runtime import streaming
        from floyd.runtime.machine import ANY_CARD
        from floyd.runtime.transfers import CountingTransfers

        counting = CountingTransfers()
        memory.this_machine = lambda: ANY_CARD  # type: ignore[attr-defined]
        streaming.transfers_to = lambda _: counting  # type: ignore[attr-defined]
        return cls(is_real=False, counting=counting)

    def begin(self) -> float:
        if self.is_real:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.counting.released()
            self.counting.copied_bytes = 0
        return time.perf_counter()

    def end(self, begin: float) -> dict[str, Any]:
        if not self.is_real:
            return {"seconds": time.perf_counter() - begin, "carried_bytes": self.counting.copied_bytes}
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "card_peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved()}  # fmt: skip


def floyd_row(folders: Sequence[str], budget: str, few: int | None, device: str) -> dict[str, Any]:
    from floyd import Cascade
    from floyd.pipelines.sizing import Workload
    from floyd.runtime.budget import Budget

    card = Card.of(device)
    steps = () if few is None else (few,) * len(folders)
    vram = {WHOLE: "120GB", SMALLEST: smallest(folders, steps) if budget == SMALLEST else None}.get(budget, budget)
    cascade = Cascade.from_pretrained(
        *folders, variant=made_up.VARIANT, memory=Budget(vram=vram, ram="110GB"), memory_for=Workload(steps=steps)
    )
    for stage in cascade.stages.values():
        stage.set_progress_bar_config(disable=True)
    cascade(PROMPT, steps=2)  # kernels are chosen, and the ring learns the way
    begin = card.begin()
    image = cascade(PROMPT, steps=few).images[0]
    told = card.end(begin)
    assert cascade.memory is not None, "it was asked for"
    plan = cascade.memory.plan
    parts = {c.part: f"{c.precision}, {c.place}, {c.resident_bytes / c.num_bytes:.0%} there" for c in plan.choices}
    return {**told, "predicted_bytes": plan.vram_peak, "predicted_seconds": plan.seconds, "vram": vram,
            "pixels": image.size[0], "parts": parts}  # fmt: skip


def smallest(folders: Sequence[str], steps: Sequence[int]) -> int:
    """Of which there is a plan."""
    from floyd.pipelines.sizing import Sizing, Workload
    from floyd.runtime.budget import Budget
    from floyd.runtime.machine import ANY_CARD
    from floyd.runtime.plan import plan

    parts = Sizing.of_models(folders, machine=ANY_CARD, workload=Workload(steps=steps), variant=made_up.VARIANT).parts()
    least, enough = 0, 10**9
    while enough - least > 10**5:
        size = (least + enough) // 2
        try:
            plan(parts, Budget(vram=size, ram="110GB"), ANY_CARD)
            enough = size
        except ValueError:
            least = size
    return enough


def incumbent_row(folders: Sequence[str], kind: str, few: int, device: str) -> dict[str, Any]:
    """Wired by hand, as its page has it: three pipelines, one text."""
    from diffusers import IFPipeline, IFSuperResolutionPipeline, StableDiffusionUpscalePipeline

    card = Card.of(device)
    told: dict[str, Any] = {"torch_dtype": torch.bfloat16, "variant": made_up.VARIANT}
    first = IFPipeline.from_pretrained(folders[0], **told)
    second = IFSuperResolutionPipeline.from_pretrained(folders[1], **told)
    third = StableDiffusionUpscalePipeline.from_pretrained(folders[2], **told)
    for pipe in (first, second, third):
        pipe.set_progress_bar_config(disable=True)
        if device == "cuda":
            offloaded(pipe, kind)

    def painted(steps: int) -> Any:
        positive, negative = first.encode_prompt(PROMPT)
        text = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "num_inference_steps": steps}
        small = first(**text, output_type="pt").images
        medium = second(image=small, **text, output_type="pt").images
        return third(PROMPT, image=medium, noise_level=100, num_inference_steps=steps).images[0]

    painted(1)
    begin = card.begin()
    image = painted(few)
    return {**card.end(begin), "pixels": image.size[0]}


def offloaded(pipe: Any, kind: str) -> None:
    if kind == "model":
        pipe.enable_model_cpu_offload()
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="leaf_level",
            use_stream=True,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the rows


class Rows:
    """Each in a process of its own, until the time is used up."""

    def __init__(self, told: argparse.Namespace, folders: Sequence[str]) -> None:
        self.told, self.folders = told, folders
        self.figures: dict[str, Any] = {}
        self.deadline = told.begun + told.seconds

    def add(self, name: str, kind: str, how: str, few: int | None) -> dict[str, Any]:
        left = self.deadline - time.perf_counter()
        if left < 5:
            row: dict[str, Any] = {"is_stopped": "no time left"}
        else:
            told = ["--device", self.told.device, "--child", kind, how, json.dumps(few), *self.folders]
            row = watched.run([__file__, *told], timeout_s=left)
        self.figures[name] = row
        print(line(name, row), flush=True)
        return row


def line(name: str, row: Mapping[str, Any]) -> str:
    if row["is_stopped"] is not None:
        return f"{name:34} {row['is_stopped']}"
    said = f"{name:34} {row['seconds']:7.2f} s"
    for key, words in (("card_peak_bytes", "peak"), ("predicted_bytes", "predicted"), ("carried_bytes", "carried")):
        said += f"   {words} {row[key] / 1e9:.3f} GB" if key in row else ""
    return said


def by_budget(rows: Rows, budgets: Sequence[str]) -> dict[str, Any]:
    """How many times as long as with everything on the card."""
    whole = rows.add("floyd, all of it there", "floyd", WHOLE, rows.told.few_for_budgets)
    times: dict[str, Any] = {}
    for budget in budgets:
        row = rows.add(f"floyd, {budget}", "floyd", budget, rows.told.few_for_budgets)
        if row["is_stopped"] is None and whole["is_stopped"] is None:
            times[budget] = row["seconds"] / whole["seconds"]
            goal = f", goal at most {GOALS[budget]}" if budget in GOALS else ""
            print(f"{'':34} {times[budget]:7.2f} times as long{goal}", flush=True)
    return {"times_as_long": times}


def beside_incumbent(rows: Rows, few: int) -> dict[str, Any]:
    """How many times as fast as each of the incumbent's ways, at the peak that it has."""
    times: dict[str, Any] = {}
    for kind, goal in FASTER.items():
        theirs = rows.add(f"diffusers, {kind} offload", "incumbent", kind, few)
        if theirs["is_stopped"] is not None:
            continue
        peak = str(theirs["card_peak_bytes"]) if rows.told.device == "cuda" else SMALLEST
        own = rows.add(f"floyd at the peak of {kind}", "floyd", f"{peak}B" if peak.isdigit() else peak, few)
        if own["is_stopped"] is None:
            times[kind] = theirs["seconds"] / own["seconds"]
            print(f"{'':34} {times[kind]:7.2f} times as fast, goal at least {goal}", flush=True)
    return {"times_as_fast": times}


def measured(told: argparse.Namespace) -> dict[str, Any]:
    scratch = Path(told.scratch or mkdtemp(prefix="floyd-gpu-"))
    stages = checkpoints(told.size)[1] if told.size == "tiny" else made_up.cascade("IF-I-XL", "IF-II-L")
    try:
        folders, pool = [], made_up.Pool()
        for name, stage in stages.items():
            folder = scratch / name
            if not (scratch / f"{name}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                made_up.write_stage(stage, folder, pool)
                (scratch / f"{name}.done").touch()
            folders.append(str(folder))
        print(f"{sum(made_up.bytes_in(Path(f)) for f in folders) / 1e9:.2f} GB of weights after "
              f"{time.perf_counter() - told.begun:.0f} s", flush=True)  # fmt: skip
        rows = Rows(told, folders)
        figures: dict[str, Any] = {}
        if told.part in ("budgets", "both"):
            figures |= by_budget(rows, told.budgets or BUDGETS[told.size])
        if told.part in ("incumbent", "both"):
            figures |= beside_incumbent(rows, told.few)
        return {"device": device_name(told.device), "size": told.size, "few": told.few, **figures, "rows": rows.figures}
    finally:
        if not told.keep:
            shutil.rmtree(scratch, ignore_errors=True)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the device that counts bytes"


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cuda where it is")
    parser.add_argument("--size", choices=["real", "tiny"], help="real on cuda, else tiny")
    parser.add_argument("--part", choices=["budgets", "incumbent", "both"], default="both")
    parser.add_argument("--budgets", nargs="+", metavar="SIZE", help="of the card; 14GB 8GB 6GB 4GB unless told")
    parser.add_argument("--few", type=int, default=4, help="steps of each stage beside the incumbent")
    parser.add_argument("--few-for-budgets", type=int, help="steps of each stage, instead of the checkpoints' own")
    parser.add_argument("--seconds", type=float, default=570, help="for everything, files included")
    parser.add_argument("--scratch", help="a folder for the files")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--dry", action="store_true", help="write no results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    told.device = told.device or ("cuda" if torch.cuda.is_available() else "cpu")
    told.size = told.size or ("real" if told.device == "cuda" else "tiny")
    told.begun = time.perf_counter()
    return told


def main() -> None:
    told = parsed()
    if told.child is not None:
        kind, how, few, *folders = told.child
        row = incumbent_row if kind == "incumbent" else floyd_row
        print(json.dumps(row(folders, how, json.loads(few), told.device)))
        return
    figures = measured(told)
    name = "gpu_memory" if told.device == "cuda" else "gpu_memory_counted"
    if not told.dry:
        print(write(name if told.part == "both" else f"{name}_{told.part}", figures))


if __name__ == "__main__":
    main()
