"""`floyd eval`: how often pictures show what their prompts say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from floyd.apps.cli.generate import Guide, GuideInterval, QualityName, Steps
from floyd.apps.cli.models import (
    Device,
    Dtype,
    EngineName,
    Models,
    Quantization,
    Quiet,
    Threads,
    Variant,
    engines_of,
    hash_of,
    load,
    name_of,
)
from floyd.apps.cli.progress import progress
from floyd.apps.cli.refusals import refusing
from floyd.apps.settings import Settings

if TYPE_CHECKING:
    from floyd.apps.evaluate import Answer, Report, Share

MOST_SHOWN = 100  # pictures on a sheet
COLUMNS = 10

Prompts = Annotated[
    int,
    typer.Option(
        "--prompts",
        min=1,
        help="How many prompts, in equal parts: one object, two and their relation, three, and held-out pairs of "
        "colour and shape.",
    ),
]
Sizes = Annotated[
    str | None,
    typer.Option(
        metavar="64[,256[,1024]]",
        help="At which sizes: pictures that are right at the first are enlarged, and those counted that still show the "
        "same scene.",
        show_default="the first stage's, 64",
    ),
]
Rendered = Annotated[
    bool,
    typer.Option("--rendered", help="Begin with the scenes themselves, drawn: measures what enlarging alone keeps."),
]
Seed = Annotated[int, typer.Option(min=0, help="Another seed, other prompts and pictures.")]
Batch = Annotated[int, typer.Option(min=1, help="How many pictures to paint at once.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write all numbers to this file, too.", show_default=False)
]
Pictures = Annotated[
    Path | None,
    typer.Option(help=f"Write sheets of up to {MOST_SHOWN} right and wrong pictures into this folder."),
]


def evaluate(
    num_prompts: Prompts = 500,
    sizes: Sizes = None,
    rendered: Rendered = False,
    seed: Seed = 0,
    quality: QualityName = None,
    steps: Steps = None,
    guidance: Guide = None,
    guidance_interval: GuideInterval = None,
    batch: Batch = 32,
    model: Models = None,
    variant: Variant = None,
    json_file: JsonFile = None,
    pictures: Pictures = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    engine: EngineName = "auto",
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Measure how often pictures show all that their prompts say.

    Draws prompts that training never saw, paints them, reads the pictures, and counts those in which everything is
    there and nothing else, and every kind of claim for itself.
    """
    with refusing():
        settings = Settings.parsed(steps=steps, guidance=guidance, guidance_interval=guidance_interval)
        wanted = parsed_sizes(sizes)
        check_paths(json_file, pictures)
        places: dict[str, Any] = {"variant": variant, "dtype": dtype, "device": device, "threads": threads}
        places["size"] = max(wanted) if wanted else None
        cascade = load(model, quantization=quantization, engine=engine, quality=quality, **places)

        from floyd.apps.evaluate import CascadePainter, Painter, RenderedFirst, check_sizes, prompts, report
        from floyd.apps.evaluate import evaluate as answered

        painter: Painter = CascadePainter(cascade, settings)
        if rendered:
            painter = RenderedFirst(painter)
        wanted = check_sizes(painter, wanted)
        asked = prompts(num_prompts, seed=seed)
    with progress(quiet=quiet) as bars:
        bars.start("pictures", len(asked))
        answers = answered(painter, asked, sizes=wanted, batch=batch, on_painted=_Told(bars, wanted[0]))
    result = report(answers, wanted)
    if json_file is not None:
        origin = {
            "model": name_of(model), "model_hash": hash_of(model), "variant": variant, "prompts": num_prompts,
            "seed": seed, "rendered": rendered, "quality": quality, "steps": steps, "guidance": guidance,
            "guidance_interval": guidance_interval,
            "quantization": quantization, "engine": engines_of(cascade),
        }  # fmt: skip
        json_file.write_text(json.dumps({**origin, **result.to_json()}, indent=2) + "\n")
    if pictures is not None:
        write_sheets(answers, pictures)
    print("\n".join(lines(result)))


def check_paths(json_file: Path | None, pictures: Path | None) -> None:
    """Whatever would go wrong after the work goes wrong before it."""
    for path in (json_file, pictures):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"There is no folder {path.parent}: make it first, or write elsewhere.")
    if json_file is not None and json_file.is_dir():
        raise ValueError(f"--json {json_file} is a folder; name a file in it.")
    if pictures is not None and pictures.exists() and not pictures.is_dir():
        raise ValueError(f"--pictures {pictures} is a file; name a folder.")


def parsed_sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"sizes must be as in 64,256,1024; got {text!r}.") from error


class _Told:
    """The bar counts the first size; pictures of larger ones are a note, for how many there will be is not known."""

    def __init__(self, bars: Any, first: int) -> None:
        self._bars, self._first = bars, first
        self._larger: dict[int, int] = {}

    def __call__(self, size: int, count: int) -> None:
        if size == self._first:
            self._bars.step(count)
        else:
            self._larger[size] = self._larger.get(size, 0) + count
            self._bars.step(0, ", ".join(f"{number} at {side} px" for side, number in self._larger.items()))


def lines(result: Report) -> list[str]:
    """A table: a row for each split, a column for each kind of claim."""
    rows = [*result.splits.items(), ("all", result.total)]
    kinds = list(result.total.claims)
    table = [["", "right", "", *kinds]]
    for name, score in rows:
        counted = f"{score.everything.right}/{score.everything.of}"
        table.append(
            [name.replace("_", " "), _percent(score.everything), counted, *map(_percent, score.claims.values())]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    text = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
    kept = [
        f"at {size} px the same scene: {_percent(share)} ({share.right}/{share.of} of the right ones)"
        for size, share in result.kept.items()
    ]
    return [*text, *kept]


def _percent(share: Share) -> str:
    return "-" if share.share is None else f"{share.share:.1%}"


def write_sheets(answers: Sequence[Answer], folder: Path) -> None:
    """right.png and wrong.png; their metadata says for each picture, row by row, what was asked and what is wrong."""
    folder.mkdir(exist_ok=True)
    for name, is_right in (("right", True), ("wrong", False)):
        shown = [answer for answer in answers if answer.is_right == is_right]
        if shown:
            _write_sheet(shown[:MOST_SHOWN], len(shown), folder / f"{name}.png")


def _write_sheet(shown: Sequence[Answer], total: int, path: Path) -> None:
    import numpy as np

    from floyd.images.convert import numpy_to_pil
    from floyd.images.grid import make_image_grid
    from floyd.images.metadata import save_png

    rows = -(-len(shown) // COLUMNS)
    blank = np.full_like(shown[0].picture, 255)
    cells = [answer.picture for answer in shown] + [blank] * (rows * COLUMNS - len(shown))
    asked = [
        {
            "prompt": answer.asked.prompt,
            "seed": answer.asked.seed,
            "split": answer.asked.split,
            "wrong": [kind for kind, claims in answer.verdict.claims().items() if not all(claims)],
        }
        for answer in shown
    ]
    sheet = make_image_grid(numpy_to_pil(np.stack(cells)), rows, COLUMNS)
    save_png(sheet, path, {"pictures": json.dumps(asked, indent=1), "shown": f"{len(shown)} of {total}"})
