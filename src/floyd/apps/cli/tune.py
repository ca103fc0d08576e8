"""`floyd train`: a stage fine-tuned on pictures of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import closing
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from floyd.apps.cli.models import Quiet, Threads, prepare
from floyd.apps.cli.progress import Bars, progress
from floyd.apps.cli.refusals import refusing
from floyd.apps.cli.train import gently
from floyd.apps.tuning.config import TuneConfig

if TYPE_CHECKING:
    from floyd.apps.tuning.run import Run

File = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG.toml", help="Settings, by the names of the flags; flags are stronger.", show_default=False
    ),
]


def tune(config: File = None, threads: Threads = None, quiet: Quiet = False, **told: Any) -> None:
    """Fine-tune a stage on pictures with captions: LoRA, DreamBooth, textual inversion, or all weights.

    Ctrl-C stops after the step it is at; the same command then goes on as if it had not been stopped. In several
    processes: `accelerate launch -m floyd.apps.cli train`, or torchrun.
    """
    with refusing():
        settings = TuneConfig.read(config, {name: value for name, value in told.items() if value is not None})
        prepare(threads)
        from floyd.apps.tuning.run import Run

        try:
            run = Run(settings)
        except ImportError as error:  # of what is optional
            raise ValueError(str(error)) from error
    with progress(quiet=quiet or not run.workers.is_main) as bars:
        try:
            trained(run, bars)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(str(stop) or "stopped; the same command goes on from the last snapshot.") from None
    if run.workers.is_main and not quiet:
        print(run.result)


def trained(run: Run, bars: Bars) -> None:
    """All of it; KeyboardInterrupt, after saving, for who wants to stop."""
    label, before = None, 0
    with closing(run.moments()) as moments, gently() as wish:
        for moment in moments:
            if moment.label != label:
                label, before = moment.label, moment.done - 1 if moment.losses else 0
                bars.start(label, moment.total, done=before)
            note = "  ".join(f"{name} {loss:.4f}" for name, loss in moment.losses.items())
            bars.step(moment.done - before, note)
            before = moment.done
            if moment.pictures:
                bars.note(f"painted {', '.join(map(str, moment.pictures))}")
            if wish.is_to_stop and moment.losses:
                done = f"{moment.done} of {moment.total} steps"
                raise KeyboardInterrupt(f"stopped after {done}; the same command goes on from there.")


def _flag(each: Field[Any]) -> inspect.Parameter:
    """A setting as typer takes an option; what is not told is not passed on."""
    kind = get_type_hints(TuneConfig)[each.name]
    is_list = get_origin(kind) is tuple
    kinds = [part for part in get_args(kind) if part is not type(None)] if not is_list else []
    kind = list[str] if is_list else kinds[0] if kinds else kind
    name = "--" + each.name.replace("_", "-")
    names = [f"{name}/--no-{name[2:]}"] if kind is bool else [name]
    default = "" if each.default in (MISSING, None, ()) else _word(each.default)
    wish = "" if is_list is False else " Once for each."
    option = typer.Option(*names, help=each.metadata["help"] + wish, show_default=default or False)
    return inspect.Parameter(
        each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _word(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(default)
    return {True: "yes", False: "no"}[default] if isinstance(default, bool) else str(default)


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a flag for every setting of `TuneConfig`, under its own name and with its help."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
    told = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    order = [told[0], *(_flag(each) for each in fields(TuneConfig)), *told[1:]]
    command.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in order}
    return command


train = _with_flags(tune)
