"""A UNet that does not fit: floyd's ring beside the incumbent's model, sequential and group offloading.

    python benchmarks/bench_offload.py [--network IF-I-XL] [--steps 20] [--fractions 0.25 0.5 0.75] [--rounds 3]

On a GPU: seconds per step and the allocator's peak, random weights in bfloat16, the same for both sides; each of the
incumbent's ways is paired with floyd's at a budget of the same peak. Without one: the tiny network, on the device that
counts bytes, of which the table tells what would cross the link and how much would lie on the card.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from common import summary, write
from torch import nn

from floyd.models.configs import PRESETS
from floyd.models.unet import UNet2DConditionModel
from floyd.runtime.parts import least_bytes
from floyd.runtime.placement import OneAtATime
from floyd.runtime.streaming import Streamed
from floyd.runtime.transfers import CountingTransfers

TINY: dict[str, Any] = {**PRESETS["IF-I-M"], "block_out_channels": (32, 64, 96, 128), "cross_attention_dim": 128,
                        "attention_head_dim": 32, "encoder_hid_dim": 64, "addition_embed_type_num_heads": 4,
                        "layers_per_block": 1, "sample_size": 16}  # fmt: skip


def size_of(network: nn.Module) -> int:
    return sum(p.nbytes for p in network.parameters())


def units_of(network: nn.Module) -> list[int]:
    own = (sum(p.nbytes for p in layer.parameters(recurse=False)) for layer in network.modules())
    return [size for size in own if size]


def inputs(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    side = config["sample_size"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config["in_channels"], side, side, generator=generator)
    text = torch.randn(2, 77, config["encoder_hid_dim"], generator=generator)
    return x.to(device, dtype), text.to(device, dtype)


@torch.no_grad()
def loop(unet: UNet2DConditionModel, x: torch.Tensor, text: torch.Tensor, steps: int) -> torch.Tensor:
    context = unet.read(text)
    for t in range(steps):
        x = x - 0.01 * unet.step(x, t, context)[:, : x.shape[1]]
    return x


@torch.no_grad()
def their_loop(unet: Any, x: torch.Tensor, text: torch.Tensor, steps: int) -> torch.Tensor:
    for t in range(steps):
        x = x - 0.01 * unet(x, t, text, return_dict=False)[0][:, : x.shape[1]]
    return x


# ---------------------------------------------------------------------------------------------------- without a GPU


def counted(config: dict[str, Any], steps: int, fractions: list[float]) -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
    cpu = torch.device("cpu")
    x, text = inputs(config, cpu, torch.float32)
    expected = loop(unet, x, text, steps)
    whole, least = size_of(unet), least_bytes(units_of(unet))
    figures: dict[str, Any] = {"bytes": whole, "steps": steps}
    print(f"{whole / 1e6:.2f} MB of weights, {steps} steps; least on the device {least / 1e6:.2f} MB")
    for fraction in fractions:
        transfers = CountingTransfers(cpu)
        budget = max(int(fraction * whole), int(1.1 * least))
        plan = Streamed(cpu, budget, transfers=transfers)
        with plan.use(unet) as ready:  # learns the route
            loop(ready, x, text, 2)
        transfers.released()
        transfers.copied_bytes = transfers.peak_bytes = 0
        with plan.use(unet) as ready:
            if not torch.equal(loop(ready, x, text, steps), expected):
                raise SystemExit("streamed, the network computes something else")
        row = {"budget": budget, "peak": transfers.peak_bytes, "carried": transfers.copied_bytes}
        figures[f"{fraction:.0%}"] = row
        share = transfers.copied_bytes / (whole * steps)
        print(f"{fraction:5.0%}  peak {row['peak'] / 1e6:7.2f} MB of {budget / 1e6:.2f}   carried {share:6.1%} of what "
              "carrying everything at every step would be")  # fmt: skip
    return figures


# -------------------------------------------------------------------------------------------------------- on a GPU


def timed(work: Callable[[], Any], rounds: int) -> dict[str, Any]:
    work()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": summary(seconds), "peak_bytes": torch.cuda.max_memory_allocated()}


def ours(unet: UNet2DConditionModel, plan: Any, x: torch.Tensor, text: torch.Tensor, steps: int, rounds: int) -> Any:
    def work() -> None:
        with plan.use(unet) as ready:
            loop(ready, x, text, steps)

    return timed(work, rounds)


def theirs(kind: str, state: dict[str, torch.Tensor], config: dict[str, Any], *rest: Any) -> Any:
    """The incumbent's network with the same weights, offloaded its own way."""
    from accelerate import cpu_offload, cpu_offload_with_hook
    from diffusers import UNet2DConditionModel as Theirs
    from diffusers.hooks import apply_group_offloading

    x, text, steps, rounds = rest
    unet = Theirs(**config).to(torch.bfloat16).eval().requires_grad_(False)
    unet.load_state_dict(state)
    cuda = x.device
    hook: Any = None
    if kind == "model":
        unet, hook = cpu_offload_with_hook(unet, cuda)
    elif kind == "sequential":
        cpu_offload(unet, cuda)
    else:
        options: dict[str, Any] = {"offload_type": "leaf_level", "use_stream": True, "non_blocking": True}
        apply_group_offloading(unet, onload_device=cuda, offload_device=torch.device("cpu"), **options)

    def work() -> None:
        their_loop(unet, x, text, steps)
        if hook is not None:
            hook.offload()

    return timed(work, rounds)


def measured(name: str, steps: int, fractions: list[float], rounds: int) -> dict[str, Any]:
    cuda, config = torch.device("cuda"), PRESETS[name]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).to(torch.bfloat16).eval().requires_grad_(False)
    x, text = inputs(config, cuda, torch.bfloat16)
    state, whole = {key: weight.clone() for key, weight in unet.state_dict().items()}, size_of(unet)
    rest = (x, text, steps, rounds)
    figures: dict[str, Any] = {}

    def tell(key: str, row: dict[str, Any]) -> None:
        figures[key] = row
        per_step = row["seconds"]["median"] / steps
        print(f"{key:28}  {1000 * per_step:8.1f} ms/step   peak {row['peak_bytes'] / 1e9:6.2f} GB", flush=True)

    tell("floyd, whole", ours(unet, Streamed(cuda, 2 * whole), *rest))
    tell("floyd, model offload", ours(unet, OneAtATime(cuda), *rest))
    base = figures["floyd, whole"]["peak_bytes"] - whole
    for fraction in fractions:
        tell(f"floyd, {fraction:.0%} there", ours(unet, Streamed(cuda, int(fraction * whole)), *rest))
    for kind in ("model", "sequential", "group"):
        tell(f"diffusers, {kind} offload", theirs(kind, state, config, *rest))
        room = max(figures[f"diffusers, {kind} offload"]["peak_bytes"] - base, int(1.1 * least_bytes(units_of(unet))))
        tell(f"floyd at the peak of {kind}", ours(unet, Streamed(cuda, room), *rest))
        pair = [
            figures[key]["seconds"]["median"] for key in (f"diffusers, {kind} offload", f"floyd at the peak of {kind}")
        ]
        print(f"{'':28}  floyd is {pair[0] / pair[1]:.2f} times as fast")
        gc.collect()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=[name for name in PRESETS if name.startswith("IF-I-")], default="IF-I-XL")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    if torch.cuda.is_available():
        print(write("offload", measured(told.network, told.steps, told.fractions, told.rounds)))
    else:
        print(write("offload_counted", counted(TINY, told.steps, told.fractions)))


if __name__ == "__main__":
    main()
