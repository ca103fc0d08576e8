"""One guided step of a UNet on the CPU: diffusers, floyd, and floyd's engines, in turn, from the same weights.

    OMP_NUM_THREADS=1 python benchmarks/bench_engines.py [--only built-in:I IF-I-M] [--rounds 9]

wall    seconds of one step, the median of all rounds
cpu     seconds of processor time of the same, which other work on the machine disturbs less
ratio   diffusers' median in the same precision over this one
error   largest difference of one forward to diffusers in float32, over the largest number there

Text and noise level are read once before, as a pipeline does; diffusers has no way to. An engine that is not there is
left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from common import write
from torch import Tensor

from floyd.engines.registry import prepared
from floyd.errors import EngineError
from floyd.models.configs import PRESETS
from floyd.models.unet import UNet2DConditionModel
from floyd.pipelines.cascade import Cascade

TOKENS = 77
STAGES = {"built-in:I": "stage_1", "built-in:II": "stage_2", "built-in:III": "stage_3"}
ENGINES: dict[str, dict[str, Any]] = {
    "winograd": {"name": "winograd"},
    "openvino f32": {"name": "openvino", "precision": "f32"},
    "openvino bf16": {"name": "openvino", "precision": "bf16"},
}
HALF = ("diffusers bf16", "floyd bf16", "openvino bf16")


def network(which: str) -> tuple[UNet2DConditionModel, int]:
    """And the side of its pictures."""
    if which in STAGES:
        unet: UNet2DConditionModel = Cascade.built_in().stages[STAGES[which]].unet
    else:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**PRESETS[which])
    return unet.eval().requires_grad_(False), unet.config.sample_size or 64


def incumbent(unet: UNet2DConditionModel) -> Any:
    """The same weights, not a copy, in diffusers' network."""
    keys = {key: value for key, value in dict(unet.config).items() if not key.startswith("_")}
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(keys)
    theirs.load_state_dict(unet.state_dict(), assign=True)
    return theirs.eval().requires_grad_(False)


def runners(unet: UNet2DConditionModel, side: int, *, with_half: bool) -> dict[str, Callable[[], Tensor]]:
    """One guided step by each."""
    torch.manual_seed(1)
    config = unet.config
    x_BCHW = torch.randn(2, config.in_channels, side, side)
    text_BLE = torch.randn(2, TOKENS, config.encoder_hid_dim or config.cross_attention_dim)
    labels_B = None if unet.class_embedding is None else torch.full((2,), 20)

    def whole(theirs: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
        told = {"encoder_hidden_states": text_BLE.to(dtype), "class_labels": labels_B, "return_dict": False}
        return lambda: theirs(x_BCHW.to(dtype), 321, **told)[0].float()

    def split(ours: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
        context = ours.read(text_BLE.to(dtype), labels_B)
        return lambda: ours.step(x_BCHW.to(dtype), 321, context).float()

    theirs = incumbent(unet)
    found = {"diffusers": whole(theirs, torch.float32), "floyd": split(unet, torch.float32)}
    for label, options in ENGINES.items():
        try:
            found[label] = split(prepared(unet=unet, **options), torch.float32)
        except EngineError as error:
            print(f"   {label} is left out: {error}")
    if with_half:
        half = UNet2DConditionModel.from_config(dict(config)).to(torch.bfloat16).eval().requires_grad_(False)
        half.load_state_dict(unet.state_dict())
        found["diffusers bf16"] = whole(incumbent(half), torch.bfloat16)
        found["floyd bf16"] = split(half, torch.bfloat16)
    return found


@torch.no_grad()
def measured(which: str, rounds: int, *, with_half: bool) -> dict[str, Any]:
    unet, side = network(which)
    runs = runners(unet, side, with_half=with_half)
    outs: dict[str, Tensor] = {}
    first_s: dict[str, float] = {}
    for label, run in runs.items():
        begin = time.perf_counter()
        outs[label] = run()
        first_s[label] = time.perf_counter() - begin
    wall: dict[str, list[float]] = {label: [] for label in runs}
    cpu: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            run()
            wall[label].append(time.perf_counter() - begin)
            cpu[label].append(time.process_time() - begin_cpu)
    rows = {}
    for label in runs:
        base = "diffusers bf16" if label in HALF and with_half else "diffusers"
        error = (outs[label] - outs["diffusers"]).abs().max() / outs["diffusers"].abs().max()
        rows[label] = {
            "wall_s": statistics.median(wall[label]),
            "cpu_s": statistics.median(cpu[label]),
            "ratio": statistics.median(wall[base]) / statistics.median(wall[label]),
            "ratio_cpu": statistics.median(cpu[base]) / statistics.median(cpu[label]),
            "compared_with": base,
            "error": float(error),
            "first_s": first_s[label],
            "all_wall_s": wall[label],
        }
    return {
        "network": which,
        "side": side,
        "batch": 2,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["built-in:I", "IF-I-M"], choices=[*STAGES, *PRESETS])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="engines", help="of the file in results/")
    options = parser.parse_args()
    figures = []
    for which in options.only:
        figure = measured(which, options.rounds, with_half=which not in STAGES)
        figures.append(figure)
        print(f"{which}, {figure['side']} px, batch 2, {figure['threads']} thread(s), {options.rounds} rounds")
        for label, row in figure["rows"].items():
            print(
                f"   {label:15} {row['wall_s'] * 1e3:8.1f} ms  {row['ratio']:5.2f}x {row['compared_with']:14} "
                f"(cpu {row['ratio_cpu']:5.2f}x)  error {row['error']:.1e}  first {row['first_s']:.1f} s",
                flush=True,
            )
    print(write(options.name, figures))


if __name__ == "__main__":
    main()
