"""All rows of the GPU's table in one call: every network of IF and the whole way to 1024 px, beside diffusers.

    python benchmarks/bench_gpu.py [--minutes 10] [--only IF-I-XL picture] [--repeats 10]
    python benchmarks/bench_gpu.py --device cpu --size tiny --minutes 1        (tries it, at small size)

Random weights in bfloat16, the same on both sides and in memory once; steps are guided, two branches in one pass.

floor   what the arithmetic takes at the speed of this card's own matrix product, or the reading of the weights at that
        of its copying, whichever is longer
error   largest difference to diffusers, over the deviation of its numbers

Rows run in the order of their weight, everything that begins at once first; what is compiled (minutes) comes in a
second pass, as far as the time reaches. The time also decides how many rounds a row gets, at least one. A row that
fails is told, and the others go on; results/gpu.json is written after every row.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from common import write
from gpu_networks import Bench
from gpu_pictures import picture
from torch import Tensor

from floyd.diffusion.conditioning import Conditioning
from floyd.models.costs import decoder_cost, encoder_cost, unet_cost
from floyd.pipelines.deepfloyd_if import IFPipeline
from floyd.pipelines.network import Networks
from floyd.runtime.switches import Switches

TOKENS, T = 77, 501
LEAST_S = 60  # left, for something to be compiled
PROMPT = "a large red circle above a small blue square, number {}"
Work = Callable[[], Any]


@dataclass
class Row:
    """One piece of work, done by several; the first is the incumbent."""

    works: Mapping[str, Callable[[], Work]]  # each is set up when its turn comes
    flops: float = 0.0
    weight_bytes: float = 0.0
    repeats: int = 1  # in one measurement, so that a launch may hide behind the work before it
    pictures: int = 0  # that one piece of work paints, if it paints any
    slow: tuple[str, ...] = field(default_factory=tuple)  # the works that are compiled first


def unet_row(bench: Bench, name: str, repeats: int, prompts: int = 1) -> Row:
    theirs, network = bench.unets(name)
    config, rows = network.config, 2 * prompts
    side = (256 if name == "x4-upscaler" else config.sample_size) if not bench.is_tiny else 32
    width = config.encoder_hid_dim or config.cross_attention_dim
    text_BLD = bench.normal(rows, TOKENS, width)
    x_BCHW = bench.normal(rows, config.in_channels, side, side)
    labelled = config.class_embed_type is not None or config.num_class_embeds is not None
    level_B = torch.full((rows,), 20, device=bench.device) if labelled else None

    def incumbent(compiled: bool) -> Work:
        t = torch.tensor(T, device=bench.device)
        told = {"encoder_hidden_states": text_BLD, "return_dict": False}
        told |= {} if level_B is None else {"class_labels": level_B}
        mode = "reduce-overhead" if bench.device.type == "cuda" else None
        network = torch.compile(theirs, mode=mode, fullgraph=True) if compiled else theirs
        return lambda: network(x_BCHW, t, **told)[0]

    def ours(switches: Switches) -> Work:
        told = Conditioning(text_BLD, None, level_B)
        step = Networks.of(network, switches, [T]).told(told)
        return lambda: step(x_BCHW, T, told)

    best = Switches.best_for(bench.device)
    works: dict[str, Callable[[], Work]] = {"diffusers": partial(incumbent, False), "floyd": partial(ours, best)}
    if bench.device.type == "cuda":
        graphs = replace(best, graphs=True)
        works["floyd graphs"] = partial(ours, graphs)
        works["floyd graphs nhwc"] = partial(ours, replace(graphs, channels_last=True))
    works["diffusers compiled"] = partial(incumbent, True)
    works["floyd compiled"] = partial(ours, best.when_compiled(bench.device))
    cost = unet_cost(config, side, side)
    return Row(works, rows * cost.flops, size_of(network), repeats, prompts, ("diffusers compiled", "floyd compiled"))


def vae_row(bench: Bench, repeats: int) -> Row:
    theirs, network = bench.vaes()
    side = 32 if bench.is_tiny else 256
    z_BZhw = bench.normal(1, network.config.latent_channels, side, side)
    works: dict[str, Callable[[], Work]] = {
        "diffusers": lambda: lambda: theirs.decode(z_BZhw, return_dict=False)[0],
        "floyd": lambda: lambda: network.decode(z_BZhw, return_dict=False)[0],
    }
    return Row(works, decoder_cost(network.config, side, side).flops, size_of(network.decoder), repeats)


def t5_row(bench: Bench, repeats: int) -> Row:
    """A prompt and the empty one, from text to states; another prompt each time."""
    import diffusers

    kinds = {"diffusers": diffusers.IFPipeline, "floyd": IFPipeline}
    encoders, tokenizers = (dict(zip(kinds, both, strict=True)) for both in (bench.t5s(), bench.tokenizers()))
    rest = {"unet": None, "scheduler": None, "safety_checker": None, "feature_extractor": None, "watermarker": None}

    def reading(name: str) -> Work:
        texts = {"tokenizer": tokenizers[name], "text_encoder": encoders[name]}
        pipe, count = kinds[name](**rest, **texts, requires_safety_checker=False), iter(range(10**9))
        return lambda: pipe.encode_prompt(PROMPT.format(next(count)), device=bench.device)[0]

    cost = encoder_cost(encoders["floyd"].config, num_tokens=TOKENS)
    return Row({name: partial(reading, name) for name in kinds}, 2 * cost.flops, size_of(encoders["floyd"]), repeats)


def picture_row(bench: Bench) -> Row:
    """Prompt embeddings to 1024 px; 50, 50 and 75 steps, all guided."""
    works, flops = picture(bench)
    return Row(works, flops, pictures=1, slow=("floyd compiled",))


def rows(bench: Bench, repeats: int) -> dict[str, Callable[[], Row]]:
    """In the order of their weight."""
    networks = {name: partial(unet_row, bench, name, repeats) for name in ("IF-I-XL", "IF-I-M", "IF-I-L")}
    networks |= {name: partial(unet_row, bench, name, repeats) for name in ("IF-II-L", "x4-upscaler")}
    batches = {f"IF-I-XL, {n} prompts": partial(unet_row, bench, "IF-I-XL", max(1, repeats // 3), n) for n in (4, 16)}
    small = {"VAE": partial(vae_row, bench, max(1, repeats // 3)), "T5": partial(t5_row, bench, repeats)}
    return {**networks, **small, "picture": partial(picture_row, bench), **batches}


def size_of(network: torch.nn.Module) -> float:
    return float(sum(weight.nbytes for weight in network.parameters()))


# ------------------------------------------------------------------------------------------------------------ measuring


class Clock:
    def __init__(self, device: torch.device, minutes: float) -> None:
        self.device, self.end = device, time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def seconds(self, work: Work, repeats: int) -> float:
        self.wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - begin) / repeats

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def ceilings(bench: Bench, clock: Clock) -> dict[str, float]:
    """What this card does at its best: products per second, and bytes per second read."""
    side = 512 if bench.is_tiny else 8192
    a, copied = bench.normal(side, side), bench.normal(side * side * 8)
    product_s = min(clock.seconds(lambda: a @ a, 5) for _ in range(4))
    copy_s = min(clock.seconds(lambda: copied.clone(), 5) for _ in range(4))
    return {"flops_per_s": 2 * side**3 / product_s, "bytes_per_s": 2 * copied.nbytes / copy_s}


@torch.no_grad()
def measured(make: Callable[[], Row], ceiling: dict[str, float], clock: Clock, budget_s: float, slow: bool) -> Any:
    """A row's table; with `slow` only what is compiled, beside the incumbent."""
    begin, row = time.monotonic(), make()
    names = [name for name in row.works if (name in row.slow) == slow or name == next(iter(row.works))]
    found: dict[str, Any] = {}
    ready: dict[str, Work] = {}
    expected: Tensor | None = None
    for name in names:
        try:
            work = row.works[name]()
            for _ in range(2):  # the first time kernels are chosen or compiled; the second time graphs are recorded
                out = torch.as_tensor(work()).float()
            clock.wait()
        except Exception as error:  # one of many: the others are still worth knowing
            found[name] = {"failed": told(error)}
            continue
        expected = out.clone() if expected is None else expected
        found[name] = {"error": float((out - expected).abs().max() / expected.std())}
        ready[name] = work
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    while not any(seconds.values()) or (time.monotonic() - begin < budget_s and len(next(iter(seconds.values()))) < 9):
        if not ready:
            break
        for name, work in ready.items():
            seconds[name].append(clock.seconds(work, row.repeats))
    floor_s = max(row.flops / ceiling["flops_per_s"], row.weight_bytes / ceiling["bytes_per_s"])
    base = statistics.median(seconds[names[0]]) if names[0] in seconds else float("nan")
    for name, all_s in seconds.items():
        median = statistics.median(all_s)
        found[name] |= {"ms": 1e3 * median, "ratio": base / median, "over_floor": median / floor_s, "all_s": all_s}
        if row.pictures:
            found[name]["pieces_per_s"] = row.pictures / median
    return {"floor_ms": 1e3 * floor_s, "tflop": row.flops / 1e12, "ways": found}


def told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def passes(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row], bool]]:
    every = {name: make for name, make in rows(bench, options.repeats).items() if wanted(name, options.only)}
    for slow in (False, True):
        for name, make in every.items():
            if not slow or name not in ("VAE", "T5"):
                yield name, make, slow


def wanted(name: str, only: list[str]) -> bool:
    return not only or any(name == some or name.startswith(f"{some},") for some in only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--name", default=None, help="of the file in results/; gpu, and none at small size")
    options = parser.parse_args()
    is_tiny, device = options.size == "tiny", torch.device(options.device)
    bench = Bench(device, torch.float32 if device.type == "cpu" else torch.bfloat16, is_tiny)
    clock = Clock(device, options.minutes - 0.5)  # what is begun has to end
    torch.backends.cudnn.benchmark = True  # for both
    torch.set_float32_matmul_precision("high")
    figures: dict[str, Any] = {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(bench.dtype),
        "ceilings": ceilings(bench, clock),
        "rows": {},
    }
    name = options.name or (None if is_tiny else "gpu")
    todo = list(passes(bench, options))
    for i, (row, make, slow) in enumerate(todo):
        if slow and clock.left_s < LEAST_S:
            print(f"{row}, compiled: no time left")
            continue
        torch._dynamo.reset()
        share_s = clock.left_s / (len(todo) - i)
        try:
            table = measured(make, figures["ceilings"], clock, share_s, slow)
        except Exception as error:
            table = {"failed": told(error), "ways": {}}
        key = f"{row}, compiled" if slow else row
        figures["rows"][key] = table
        show(key, table)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if name:
            write(name, figures)


def show(key: str, table: dict[str, Any]) -> None:
    print(f"\n{key}: " + table.get("failed", f"floor {table.get('floor_ms', 0):.2f} ms"), flush=True)
    for name, way in table["ways"].items():
        if "failed" in way:
            print(f"  {name:20} {way['failed']}")
        elif "ms" in way:
            print(
                f"  {name:20} {way['ratio']:6.2f}x {way['ms']:10.2f} ms  {way['over_floor']:5.2f} times the floor"
                f"   error {way['error']:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
