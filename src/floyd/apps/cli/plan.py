"""`floyd plan`: where each network of a cascade would lie, in what precision, and what that costs. Nothing is loaded,
and the card that it is about need not be here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from floyd.apps.cli.models import BUILT_IN, Ram, Variant, expanded_or_built_in
from floyd.apps.cli.refusals import refusing

if TYPE_CHECKING:
    from floyd.runtime.plan import Choice, Plan

Model = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="A folder of stages, or up to three folders or hub ids of pipelines; if-m, if-l, if-xl are DeepFloyd's, "
        f"{BUILT_IN} is floyd's own. They need not be downloaded.",
        show_default=False,
    ),
]
CardSizes = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE[,SIZE...]",
        help="How much of the card's memory there is, as in 8GB; several sizes are compared, 12GB+12GB is two cards, "
        "0 is none.",
        show_default="what is free",
    ),
]
PlanSize = Annotated[
    str | None,
    typer.Option(metavar="64|256|1024|WxH", help="As for `floyd generate`.", show_default="the largest"),
]
PlanCount = Annotated[int, typer.Option(min=1, help="How many pictures at once.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")]
Exact = Annotated[bool, typer.Option("--exact", help="Quantize nothing: 16 bits or more for every weight.")]

WHERE = {
    "card": "on the card",
    "visits": "comes to the card",
    "streamed": "streamed",
    "cpu": "main memory",
}


def plan(
    model: Model,
    vram: CardSizes = None,
    ram: Ram = None,
    size: PlanSize = None,
    count: PlanCount = 1,
    variant: Variant = None,
    exact: Exact = False,
    as_json: AsJson = False,
) -> None:
    """Say what a model would do with so much memory: which network lies where, in what precision, how long it takes.

    Seconds are estimates, for the card that is here or for one of the middle class; bytes are meant to be kept.
    """
    sizes = [None] if vram is None else [each.strip() for each in vram.split(",")]
    with refusing():
        made = [
            planned(model, vram=each, ram=ram, size=size, count=count, variant=variant, exact=exact) for each in sizes
        ]
    if as_json:
        told = [one.to_json() for one in made]
        print(json.dumps(told if len(sizes) > 1 else told[0], indent=2))
        return
    for line in table(made[0]) if len(sizes) == 1 else comparison(sizes, made):
        print(line)


def planned(
    models: list[str],
    *,
    vram: str | None,
    ram: str | None,
    size: str | None = None,
    count: int = 1,
    variant: str | None = None,
    exact: bool = False,
    machine: Any = None,
) -> Plan:
    """`vram` without a card asks what a card would do, `vram` 0 what this machine would do without its own."""
    from floyd.apps.cli.generate import parsed_size
    from floyd.pipelines.sizing import Sizing, Workload
    from floyd.runtime.budget import Budget, parse_bytes
    from floyd.runtime.machine import ANY_CARD, cpu, this_machine
    from floyd.runtime.plan import plan

    cards = None if vram in (None, "auto") else tuple(parse_bytes(one, name="vram") for one in str(vram).split("+"))
    budget = Budget(vram=cards, ram=ram, quantize=not exact)
    if machine is None:
        machine = this_machine()
        if cards is not None and not any(cards):
            machine = cpu()
        elif cards is not None and not machine.has_card:
            machine = ANY_CARD
    workload = Workload(size=parsed_size(size), count=count)
    sizing = Sizing.of_models(expanded_or_built_in(models), machine=machine, workload=workload, variant=variant)
    return plan(sizing.parts(), budget.measured(), machine, count=count)


def table(made: Plan) -> list[str]:
    """In columns, and below them what it comes to."""
    head = ("component", "where", "dtype", "GB", "of it there", "peak GB", "s/image", "why")
    rows = [head, *(_row(choice, made.count) for choice in made.choices)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    return [*lines, "", *summary(made)]


def comparison(sizes: Sequence[str | None], plans: Sequence[Plan]) -> list[str]:
    """A row for each size of card, as Markdown has tables."""
    names = [
        choice.part for choice in plans[0].choices if choice.part.endswith(("unet", "stage_1.text_encoder", "vae"))
    ]
    head = ["`--vram`", *names, "peak of VRAM", "of RAM", "s/image"]
    rows = [
        [
            f"`{size}`",
            *(_brief(made[name]) for name in names),
            f"{_gb(made.vram_peak)} GB",
            f"{_gb(made.ram_peak)} GB",
            f"{made.seconds_per_image:.1f}",
        ]
        for size, made in zip(sizes, plans, strict=True)
    ]
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def _brief(choice: Choice) -> str:
    kind = choice.precision.quantization or choice.precision.dtype
    share = f" {choice.resident_bytes / choice.num_bytes:.0%} there" if choice.place == "streamed" else ""
    place = {"card": "stays", "visits": "comes", "streamed": "streamed", "cpu": "main memory"}[choice.place]
    return f"{kind}, {place}{',' if share else ''}{share}"


def summary(made: Plan) -> list[str]:
    cards = [f"peak of VRAM {_gb(peak)} GB" for peak in made.vram_peaks]
    if len(cards) > 1:
        cards = [f"card {i}: {said}" for i, said in enumerate(cards)]
    said = [*cards, f"peak of RAM {_gb(made.ram_peak)} GB", f"about {made.seconds_per_image:.3g} s per image"]
    return [f"{', '.join(said)} on {made.machine.name}"]


def _row(choice: Choice, count: int) -> tuple[str, ...]:
    where = WHERE[choice.place] + (f" {choice.card}" if choice.card else "") + ("" if choice.is_kept else ", from disk")
    cut = f" {choice.way.rows} of a batch at once." if choice.way.chunks > 1 and choice.way.tile is None else ""
    cut += f" In tiles of {choice.way.tile} latents." if choice.way.tile is not None else ""
    return (
        choice.part,
        where,
        str(choice.precision),
        _gb(choice.num_bytes),
        _gb(choice.resident_bytes),
        _gb(choice.peak_bytes),
        f"{choice.seconds / count:.3g}",
        choice.why + ("." + cut if cut else ""),
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}"
