"""DreamBooth LoRA of the built-in stage I: steps per second and peak memory, beside diffusers' training loop.

    python benchmarks/bench_dreambooth.py [--steps 20] [--rounds 3] [--batch 4]
                                          [--precision fp32 bf16]

diffusers' script (examples/dreambooth/train_dreambooth_lora.py) is not in its package. Its loop is written here anew
with diffusers' and accelerate's parts, step for step as the script does it for IF: embeddings computed beforehand,
uniform timesteps, LoRA through `add_adapter` on the same six layers, the squared error of the noise alone (the
variance is thrown away), prior preservation by halves, gradients cut to a norm of 1. Pictures are opened and cut anew
for every step, as the script's data set does it; PIL and numpy stand in for torchvision.

Same weights, pictures, captions, rank, batch and precision; each side in a process of its own, in turn. floyd does
more in a step: it trains the variance. "no compiler" is floyd without one, and so without kernels of its
own. Besides seconds by the clock, those of the processor are told, which other processes hardly disturb.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import summary, write
from PIL import Image

PRECISIONS = ("fp32", "bf16")
SIDES = ("floyd", "no compiler", "diffusers")
RANK, RATE, WARM = 4, 1e-4, 3  # WARM steps are not counted
PROMPT, CLASS_PROMPT = "a zorp", "a ring"
TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]


def made(folder: Path) -> None:
    """Twelve pictures of each kind, 256 px."""
    from floyd.scenes.render import render
    from floyd.scenes.scene import sample_scene

    rng = np.random.default_rng(0)
    for kind in ("own", "class"):
        (folder / kind).mkdir()
        for i in range(12):
            Image.fromarray(render(sample_scene(rng, things=1), 256)).save(folder / kind / f"{i:02}.png")
            (folder / kind / f"{i:02}.txt").write_text(PROMPT if kind == "own" else CLASS_PROMPT)


def floyd_steps(folder: Path, steps: int, batch: int, precision: str) -> Iterator[tuple[float, float]]:
    from floyd.apps.tuning.config import TuneConfig
    from floyd.apps.tuning.run import Run

    config = TuneConfig.of(
        method="dreambooth",
        data=str(folder / "own"),
        class_data=str(folder / "class"),
        out=str(folder / "floyd"),
        steps=steps,
        batch=batch,
        rank=RANK,
        alpha=float(RANK),
        rate=RATE,
        precision=precision,
        device="cpu",
        snapshot_every_s=1e9,
    )
    for moment in Run(config).moments():
        if moment.label == "training":
            yield time.monotonic(), time.process_time()


class Halves(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A picture of each kind, opened when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.own, self.kept = (sorted((folder / kind).glob("*.png")) for kind in ("own", "class"))

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"own": self._opened(self.own[index]), "kept": self._opened(self.kept[index])}

    def _opened(self, path: Path) -> torch.Tensor:
        picture = Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1


def collated(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([row["own"] for row in rows] + [row["kept"] for row in rows])


def diffusers_steps(folder: Path, steps: int, batch: int, precision: str) -> Iterator[tuple[float, float]]:
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else "no")
    root = files("floyd") / "mini" / "stage_1"
    pipe: Any = IFPipeline.from_pretrained(
        str(root), unet=None, safety_checker=None, requires_safety_checker=False, torch_dtype=torch.float32
    )
    texts = [PROMPT] * (batch // 2) + [CLASS_PROMPT] * (batch // 2)
    text_BLE = pipe.encode_prompt(texts, do_classifier_free_guidance=False)[0].detach()
    del pipe
    noising: Any = DDPMScheduler.from_pretrained(str(root), subfolder="scheduler")
    unet: Any = UNet2DConditionModel.from_pretrained(str(root), subfolder="unet", torch_dtype=torch.float32)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    loader: Any = torch.utils.data.DataLoader(
        Halves(folder), batch_size=batch // 2, shuffle=True, drop_last=True, collate_fn=collated
    )
    rate: Any = get_scheduler("constant", optimizer)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    done = 0
    unet.train()
    while True:
        for clean_BCHW in loader:
            with accelerator.accumulate(unet):
                noise_BCHW = torch.randn_like(clean_BCHW)
                t_B = torch.randint(0, noising.config.num_train_timesteps, (len(clean_BCHW),))
                noisy_BCHW = noising.add_noise(clean_BCHW, noise_BCHW, t_B)
                out_BCHW = unet(noisy_BCHW, t_B, text_BLE, class_labels=None, return_dict=False)[0]
                if out_BCHW.shape[1] == 6:
                    out_BCHW, _ = torch.chunk(out_BCHW, 2, dim=1)
                own, kept = torch.chunk(out_BCHW, 2, dim=0)
                target, target_kept = torch.chunk(noise_BCHW, 2, dim=0)
                loss = F.mse_loss(own.float(), target.float()) + F.mse_loss(kept.float(), target_kept.float())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            loss.detach().item()
            yield time.monotonic(), time.process_time()
            done += 1
            if done == steps:
                return


def one_side(side: str, folder: Path, steps: int, batch: int, precision: str) -> None:
    run = diffusers_steps if side == "diffusers" else floyd_steps
    ends = list(run(folder, steps + WARM, batch, precision))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    by_clock, by_processor = (last - first for first, last in zip(ends[WARM - 1], ends[-1], strict=True))
    speeds = {"steps_per_s": steps / by_clock, "steps_per_processor_s": steps / by_processor}
    print(json.dumps({**speeds, "peak_bytes": peak}))


def apart(side: str, options: argparse.Namespace, precision: str) -> dict[str, float]:
    """One side, in a process of its own."""
    with TemporaryDirectory() as folder:
        made(Path(folder))
        told = [f"--{name}={getattr(options, name)}" for name in ("steps", "batch")]
        command = [sys.executable, __file__, f"--side={side}", f"--folder={folder}", *told, "--precision", precision]
        hidden = {"CXX": "/nowhere"} if side == "no compiler" else {}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **hidden})
    if done.returncode:
        raise RuntimeError(f"{side} failed: {done.stderr[-2000:]}")
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(precision, side, row, flush=True)
    return row


def compared(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        side: {key: summary([row[key] for row in own]) for key in own[0]} for side, own in rows.items()
    }
    others = figures["diffusers"]
    figures["ratios"] = {  # to diffusers
        side: {key: own["median"] / others[key]["median"] for key, own in figures[side].items()}
        for side in SIDES
        if side != "diffusers"
    }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        one_side(options.side, options.folder, options.steps, options.batch, options.precision[0])
        return
    figures: dict[str, Any] = {
        "steps": options.steps,
        "batch": options.batch,
        "threads": torch.get_num_threads(),
    }
    for precision in options.precision:
        rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                rows[side].append(apart(side, options, precision))
        figures[precision] = compared(rows)
        print(precision, figures[precision]["ratios"])
    print(write("dreambooth", figures))


if __name__ == "__main__":
    main()
