"""`floyd info` and `floyd judge`: what made a picture, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from floyd.apps.cli.refusals import refusing

if TYPE_CHECKING:
    from floyd.scenes.judge import Reading

PictureFile = Annotated[Path, typer.Argument(metavar="PICTURE", help="A picture.", show_default=False)]


def info(
    picture: PictureFile, as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False
) -> None:
    """Print what made a picture that floyd wrote."""
    from floyd.images.metadata import read_info

    with refusing():
        if not picture.is_file():
            raise ValueError(f"There is no file {picture}.")
        try:
            story = read_info(picture)
        except OSError as error:
            raise ValueError(f"{picture} cannot be read as a PNG file: {error}") from error
        if not story:
            raise ValueError(f"{picture} does not say what made it.")
    if as_json:
        print(json.dumps(story, indent=2, ensure_ascii=False))
        return
    width = max(map(len, story))
    for key, text in story.items():
        print(f"{key:{width}}  {text}")


def judge(picture: PictureFile) -> None:
    """Print what a picture of coloured shapes shows, as the judge of `floyd eval` reads it."""
    with refusing():
        import numpy as np

        from floyd.images.load import load_image
        from floyd.scenes.judge import read

        reading = read(np.asarray(load_image(picture)))
    for line in told(reading):
        print(line)


def told(reading: Reading) -> list[str]:
    """A reading in words, a line for each thing; places are in percent from the left and from the top."""
    things = [
        f"a {seen.size} {seen.color} {seen.shape} at {seen.x:.0%} {seen.y:.0%} (match {seen.match:.2f})"
        for seen in reading.things
    ]
    kind, *colors = reading.background
    ground = f"a {colors[0]} background" if kind == "plain" else f"a background that fades from {' to '.join(colors)}"
    return [*(things or ["nothing"]), f"on {ground}"]
