"""`floyd train-mini`: the built-in checkpoint from nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from floyd.apps.cli.models import BUILT_IN, Quiet, Threads, device_named, prepare
from floyd.apps.cli.progress import Bars, progress
from floyd.apps.cli.refusals import refusing, say

if TYPE_CHECKING:
    from floyd.apps.mini.recipe import Recipe

Out = Annotated[Path, typer.Option("--out", help="The folder of the run; made if it is absent.", show_default=False)]
Parts = Annotated[
    str | None,
    typer.Option(
        metavar="PART[,PART...]",
        help="Of text, stage_1, stage_2, vae, stage_3; and student.",
        show_default="the first five",
    ),
]
Device = Annotated[str, typer.Option(help="Where to train: cpu, cuda, mps.")]
Scale = Annotated[float, typer.Option(help="Shorten (or lengthen) the training by this factor, for a trial.")]
Start = Annotated[
    str | None,
    typer.Option(
        help="Go on from this cascade's weights (a folder, or built-in); what --parts leaves out stays as it is.",
        show_default="from nothing",
    ),
]
Assemble = Annotated[
    bool | None,
    typer.Option(
        "--assemble/--no-assemble",
        help="Put the parts together in OUT/checkpoint, a --model for the other commands.",
        show_default="once all parts are trained",
    ),
]


def train_mini(
    out: Out,
    parts: Parts = None,
    device: Device = "cpu",
    threads: Threads = None,
    scale: Scale = 1.0,
    start: Start = None,
    assemble: Assemble = None,
    quiet: Quiet = False,
) -> None:
    """Train the built-in checkpoint, from nothing or from what there is.

    It takes hours. Ctrl-C stops after the step it is at; the same command then goes on as if it had not been stopped.
    """
    with refusing():
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file; name a folder.")
        from floyd.apps.mini.checkpoint import assemble as put_together
        from floyd.apps.mini.recipe import PARTS, Recipe

        prepare(threads)
        recipe = Recipe(out, str(device_named(device)), scale, None if start is None else folder_of(start))
        chosen = PARTS if parts is None else tuple(part.strip() for part in parts.split(","))
        if assemble and (missing := [p for p in PARTS if p not in chosen and not recipe.is_finished(p)]):
            raise ValueError(
                f"--assemble needs all parts, and {', '.join(missing)} is neither trained nor among --parts."
            )
        recipe.check(chosen)
    with progress(quiet=quiet) as bars:
        try:
            trained(recipe, chosen, bars)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(str(stop) or "stopped; the same command goes on from the last snapshot.") from None
    missing = [part for part in PARTS if not recipe.is_finished(part)]
    is_wanted = any(part in PARTS for part in chosen) if assemble is None else assemble
    if not is_wanted or missing:
        if not quiet and missing:
            say(f"not put together: {', '.join(missing)} is yet to be trained.")
        return
    put_together(out, out / "checkpoint")
    if not quiet:
        print(out / "checkpoint")


def folder_of(start: str) -> Path:
    if start == BUILT_IN:
        return Path(str(files("floyd") / "mini"))
    if not (Path(start) / "stage_1").is_dir():
        raise ValueError(f"--start {start} is no folder of a cascade (stage_1, stage_2, stage_3) and not {BUILT_IN}.")
    return Path(start)


def trained(recipe: Recipe, parts: tuple[str, ...], bars: Bars) -> None:
    """All parts; KeyboardInterrupt, after saving, for who wants to stop."""
    current = None
    with closing(recipe.train(parts)) as steps, gently() as wish:
        for part, made in steps:
            if part != current:
                bars.start(part, made.num_steps, done=made.step)
                current = part
            bars.step(1, "  ".join(f"{name} {loss:.4f}" for name, loss in made.losses.items()))
            if wish.is_to_stop:
                done = f"{made.step + 1} of {made.num_steps} steps of {part}"
                raise KeyboardInterrupt(f"stopped after {done}; the same command goes on from there.")


class _Wish:
    is_to_stop = False


@contextmanager
def gently() -> Iterator[_Wish]:
    """The first Ctrl-C is a wish, the second an order."""
    wish = _Wish()

    def hear(number: int, frame: FrameType | None) -> None:
        wish.is_to_stop = True
        signal.signal(signal.SIGINT, before)
        say("stopping after this step; Ctrl-C again stops at once, and loses what was done since the last snapshot.")

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGINT, before)
