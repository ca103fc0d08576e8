"""How many evaluations of the network a picture needs: the built-in stage I, painted in many ways, and judged.

    OMP_NUM_THREADS=1 python benchmarks/bench_presets.py [--groups samplers deciding] [--student FOLDER]
    python benchmarks/bench_presets.py --only "Euler ancestral:20" --guidance 1 2 --intervals 0-600 200-1000
    python benchmarks/plot.py && python benchmarks/tables.py --write      the charts and tables of docs/speed.md

right      the judge sees everything that the prompt says, and no other thing
distance   Frechet distance of the pictures to the prompts' own scenes, both shrunk to 8 x 8 pixels in [0, 1]; `floor`
           is that of other scenes of as many fresh prompts. Distances of different numbers of prompts do not compare
rows       of the network, for one picture: a step is one row, a guided one is two. Heun's steps are counted twice
difference to DDPM with 100 steps, on the same prompts from the same noise, with the standard error of the mean
           difference: the rows that decide the presets are painted of more prompts

Every way paints the same prompts from the same noise, with the engine "winograd", whose pictures are checked first.
What results/presets.json holds of the same weights is not painted again; with `--keep FOLDER`, no picture is that was
painted before, and more prompts can be asked later: the script may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, write

import floyd
from floyd.apps.evaluate import Answer, Asked, CascadePainter, evaluate, prompts, report
from floyd.apps.settings import Settings
from floyd.models.unet import UNet2DConditionModel
from floyd.pipelines.cascade import Cascade
from floyd.scenes.render import render
from floyd.store.fingerprint import fingerprint

NAME = "presets"
BATCH = 12
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPM": ("DDPM", {}),
    "DDIM": ("DDIM", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistep", {}),
    "DPM-Solver++ 2M SDE": ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": ("UniPCMultistep", {}),
    "Euler": ("EulerDiscrete", {}),
    "Euler ancestral": ("EulerAncestralDiscrete", {}),
    "Heun": ("HeunDiscrete", {}),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """To paint a picture."""

    sampler: str
    steps: int | str
    guidance: float
    spacing: str | None = None  # None is the sampler's own
    interval: tuple[int, int] | None = None
    network: str = "built-in"

    def painter(self, cascade: Cascade, students: dict[str, UNet2DConditionModel]) -> CascadePainter:
        """Of stage I alone."""
        kind, config = SAMPLERS[self.sampler]
        if self.spacing is not None:
            config = {**config, "timestep_spacing": self.spacing}
        stage: Any = cascade.stages["stage_1"]
        scheduler = getattr(floyd, f"{kind}Scheduler").from_config(stage.scheduler.config, **config)
        own = stage.from_pipe(stage, scheduler=scheduler, **{"unet": students[self.network]} if self.is_student else {})
        interval = () if self.interval is None else (self.interval,)
        settings = Settings(steps=(self.steps,), guidance=(self.guidance,), guidance_interval=interval)
        return CascadePainter(Cascade(own, presets={"stage_1": {}}), settings)

    @property
    def is_student(self) -> bool:
        return self.network != "built-in"

    def __str__(self) -> str:
        interval = "" if self.interval is None else "{}-{}".format(*self.interval)
        parts = (f"{self.sampler:19}", f"{self.steps!s:>8}", f"{self.spacing or '':8}", f"{self.guidance:4g}")
        return " ".join((*parts, f"{interval:>9}", f"{self.network:9}"))


def groups(guidance: float) -> dict[str, list[Way]]:
    """What is tried, by the question that it answers."""

    def ways(sampler: str, *steps: int | str, **more: Any) -> list[Way]:
        return [Way(**{"sampler": sampler, "steps": n, "guidance": guidance, **more}) for n in steps]

    few = [way for sampler in SAMPLERS if sampler != "Heun" for way in ways(sampler, 10, 20)] + ways("Heun", 6, 11)
    others = {"Euler ancestral": SPACINGS[::2], "UniPC": SPACINGS[::2], "DDPM": SPACINGS[1:]}  # than their own
    spaced = [way for name, own in others.items() for spacing in own for way in ways(name, 20, spacing=spacing)]
    tables = ways("DDPM", "fast27", "smart27", "smart50") + ways("Euler ancestral", "smart27", 40)
    scales = [way for scale in (1.0, 1.25, 2.0, 3.0) for way in ways("Euler ancestral", 20, guidance=scale)]
    parts = [
        way
        for scale in (guidance, 3.0)
        for interval in INTERVALS
        for way in ways("Euler ancestral", 20, guidance=scale, interval=interval)
    ]
    return {"guidance": scales, "intervals": parts, "samplers": few, "spacing": spaced, "tables": tables}


SPACINGS = ("leading", "linspace", "trailing")
INTERVALS = ((0, 500), (500, 1000), (250, 750))


def deciding(guidance: float) -> list[Way]:
    """Those that the presets are chosen from, the first of which is what the others are held against."""

    def way(sampler: str, steps: int | str, **more: Any) -> Way:
        return Way(**{"sampler": sampler, "steps": steps, "guidance": guidance, **more})

    ancestral = [way("Euler ancestral", steps) for steps in (25, 20, 10, 50)]
    return [way("DDPM", 100), *ancestral, way("DDPM", "smart27"), way("DDPM", 50)]


# ------------------------------------------------------------------------------------------------------------ measures


def shrunk(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """[B, 192] in [0, 1]."""
    pixels_BHWC = torch.from_numpy(np.stack(list(pictures))).float() / 255
    small_BChw = torch.nn.functional.adaptive_avg_pool2d(pixels_BHWC.permute(0, 3, 1, 2), 8)
    return small_BChw.flatten(1).double().numpy()


def frechet(one_BE: np.ndarray, other_BE: np.ndarray) -> float:
    """Of two Gaussians with the samples' means and covariances (arXiv:1706.08500, eq. 6)."""
    means = [x_BE.mean(0) for x_BE in (one_BE, other_BE)]
    covariances = [np.cov(x_BE, rowvar=False) for x_BE in (one_BE, other_BE)]
    values = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0)
    gap = means[0] - means[1]
    return float(gap @ gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(values).sum())


def scenes_of(asked: Sequence[Asked]) -> np.ndarray:
    return shrunk(render(one.scene, 64) for one in asked)


def paired(own: str, other: str) -> dict[str, float]:
    """The mean difference of two rows of answers to the same prompts, and its standard error."""
    difference = np.array([int(a) - int(b) for a, b in zip(own, other, strict=True)])
    return {"mean": float(difference.mean()), "error": float(difference.std(ddof=1) / len(difference) ** 0.5)}


def spent(painter: CascadePainter) -> tuple[int, int]:
    """Calls of the network for a picture, and its rows in them."""
    stage: Any = painter._cascade.stages["stage_1"]
    task = stage.task(prompt="a circle", **painter._options["stage_1"])
    within = task.options.guided_times
    guided = [task.options.is_guided and (within is None or step.t in within) for step in task.steps]
    return len(guided), len(guided) + sum(guided)


def measured(way: Way, painter: CascadePainter, answers: Sequence[Answer]) -> dict[str, Any]:
    result = report(answers)
    evaluations, rows = spent(painter)
    scenes_BE = scenes_of([answer.asked for answer in answers])
    return {
        **asdict(way),
        "prompts": len(answers),
        "evaluations": evaluations,
        "rows": rows,
        "right": result.total.everything.share,
        "splits": {split: score.everything.share for split, score in result.splits.items()},
        "claims": {kind: share.share for kind, share in result.total.claims.items()},
        "distance": frechet(shrunk(answer.picture for answer in answers), scenes_BE),
        "answers": "".join(str(int(answer.is_right)) for answer in answers),
    }


class Gallery:
    """What was painted and judged in each way before, in a folder, or nowhere."""

    def __init__(self, folder: Path | None, model_hash: str) -> None:
        self.folder = None if folder is None else folder / model_hash[-12:]

    def answers(self, way: Way, painter: CascadePainter, asked: Sequence[Asked]) -> list[Answer]:
        path = None if self.folder is None else self.folder / f"{'_'.join(map(str, asdict(way).values()))}.pickle"
        known: dict[Asked, Answer] = {}
        if path is not None and path.is_file():
            known = {answer.asked: answer for answer in pickle.loads(path.read_bytes())}
        new = [one for one in asked if one not in known]
        for start in range(0, len(new), BATCH):
            known |= {answer.asked: answer for answer in evaluate(painter, new[start : start + BATCH], batch=BATCH)}
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(pickle.dumps(list(known.values())))
        return [known[one] for one in asked]


def difference_of_the_engine(cascade: Cascade, way: Way) -> dict[str, float]:
    """Of pixels in [-1, 1], between pictures painted with the engine and without: many steps amplify rounding."""
    plain = Cascade.built_in()
    plain.use_engine(None)
    stages: list[Any] = [plain.stages["stage_1"], cascade.stages["stage_1"]]
    asked, pictures = prompts(4), []
    for stage in stages:
        painter = way.painter(Cascade(stage), {})
        pictures.append(torch.stack([drawn.handed for drawn in painter.draw(asked)]))
    difference_BCHW = (pictures[0] - pictures[1]).abs()
    return {"mean": float(difference_BCHW.mean()), "max": float(difference_BCHW.max())}


# ------------------------------------------------------------------------------------------------------------- results


class Results:
    """What is known of these weights; written after every row."""

    def __init__(self, model_hash: str) -> None:
        self.figures: dict[str, Any] = {"model_hash": model_hash, "floors": {}, "rows": []}
        path = RESULTS / f"{NAME}.json"
        known = json.loads(path.read_text())["figures"] if path.is_file() else {}
        if known.get("model_hash") == model_hash:
            self.figures = known

    def find(self, way: Way, num_prompts: int) -> dict[str, Any] | None:
        told = json.loads(json.dumps({**asdict(way), "prompts": num_prompts}))
        return next((row for row in self.figures["rows"] if {**row, **told} == row), None)

    def add(self, row: dict[str, Any]) -> None:
        self.figures["rows"].append(json.loads(json.dumps(row)))
        self.write()

    def compare(self, row: dict[str, Any]) -> None:
        """With DDPM in 100 steps and the checkpoint's guidance, if that is known of as many prompts."""
        first = Way(sampler="DDPM", steps=100, guidance=self.figures["guidance"])
        reference = self.find(first, row["prompts"])
        if reference is not None and row is not reference:
            row["difference"] = paired(row["answers"], reference["answers"])
            self.write()

    def write(self) -> None:
        write(NAME, self.figures)


def shown(way: Way, row: dict[str, Any]) -> str:
    text = f"{way} {row['prompts']:5} {row['evaluations']:5} {row['rows']:5} {row['right']:7.1%} {row['distance']:9.3f}"
    if (against := row.get("difference")) is not None:
        text += f"   {100 * against['mean']:+5.1f} +- {100 * against['error']:.1f} points"
    return text


def run(
    ways: Sequence[Way],
    counts: Sequence[int],
    cascade: Cascade,
    students: dict[str, Any],
    results: Results,
    gallery: Gallery,
) -> None:
    """Each way with the largest number of prompts, of which smaller numbers are a part."""
    asked = prompts(max(counts))
    parts = {count: set(prompts(count)) for count in counts}
    for count in counts:
        floor = frechet(scenes_of(prompts(count, seed=1)), scenes_of(prompts(count)))
        results.figures["floors"][str(count)] = floor
    for way in ways:
        if results.find(way, max(counts)) is None:
            painter = way.painter(cascade, students)
            answers = gallery.answers(way, painter, asked)
            for count, part in parts.items():
                own = [answer for answer in answers if answer.asked in part]
                if results.find(way, count) is None:
                    results.add(measured(way, painter, own))
        for count in counts:
            row = results.find(way, count)
            assert row is not None, "it was just added"
            results.compare(row)
            if count == max(counts):
                print(shown(way, row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="*", choices=("deciding", *groups(1)), help="Only these.")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--deciding", type=int, default=480, help="Prompts of the rows that decide.")
    parser.add_argument("--student", type=Path, help="The unet folder of a network with its guidance distilled.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="Keep what was painted here, and look here first.")
    parser.add_argument("--only", nargs="*", metavar="SAMPLER:STEPS", help="These, instead of the groups.")
    parser.add_argument("--guidance", type=float, nargs="*", default=[None])
    parser.add_argument("--intervals", nargs="*", default=[None], metavar="LOW-HIGH")
    parser.add_argument("--spacings", nargs="*", default=[None], choices=SPACINGS)
    options = parser.parse_args()

    cascade = Cascade.built_in()
    guidance = cascade.presets["stage_1"]["guidance_scale"]
    cascade.stages["stage_1"].use_engine("winograd")
    model_hash = fingerprint(Path(str(files("floyd") / "mini" / "stage_1")))
    results, gallery = Results(model_hash), Gallery(options.keep, model_hash)
    results.figures["guidance"] = guidance
    results.figures["engine_difference"] = difference_of_the_engine(cascade, deciding(guidance)[1])
    print("the engine changes pixels by {mean:.1e}, {max:.1e} at most".format(**results.figures["engine_difference"]))
    students = {}
    if options.student is not None:
        students["student " + fingerprint(options.student).removeprefix("sha256:")[:8]] = (
            UNet2DConditionModel.from_pretrained(options.student)
        )

    if options.only is not None:
        ways = [
            Way(sampler=name, steps=steps, guidance=scale or guidance, spacing=spacing, interval=interval)
            for name, steps in map(_parsed, options.only)
            for scale in options.guidance
            for interval in map(_interval, options.intervals)
            for spacing in options.spacings
        ]
        run(ways, [options.prompts], cascade, {}, results, gallery)
        return
    tried = groups(guidance)
    for name in options.groups or ["deciding", *tried]:
        if name == "deciding":
            ways = deciding(guidance)
            ways[2:2] = [replace(ways[1], guidance=1.0, network=name) for name in students]
            run(ways, [options.deciding, options.prompts], cascade, students, results, gallery)
        else:
            run(tried[name], [options.prompts], cascade, {}, results, gallery)


def _parsed(text: str) -> tuple[str, int | str]:
    name, steps = text.split(":")
    if name not in SAMPLERS:
        raise SystemExit(f"The samplers are {', '.join(SAMPLERS)}; got {name!r}.")
    return name, int(steps) if steps.isdigit() else steps


def _interval(text: str | None) -> tuple[int, int] | None:
    return None if text is None else Settings.parsed(guidance_interval=text).guidance_interval[0]


if __name__ == "__main__":
    main()
