"""`floyd generate`: a prompt becomes a picture, or several, and each file remembers how it was made."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from floyd.apps.cli.models import (
    Device,
    Dtype,
    EngineName,
    Models,
    Quantization,
    Quiet,
    Ram,
    Threads,
    Variant,
    Vram,
    engines_of,
    hash_of,
    load,
    name_of,
)
from floyd.apps.cli.progress import Bars, progress
from floyd.apps.cli.refusals import refusing
from floyd.apps.settings import Settings, said

if TYPE_CHECKING:
    from floyd.pipelines.cascade import Cascade, CascadeResult
    from floyd.pipelines.events import Event

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shows.", show_default=False)]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="The file to write, a .png; with --count, picture.png becomes picture-0.png, picture-1.png, ...",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed makes the same picture.")]
Steps = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N,N]",
        help="How many steps: one number for all stages, or one for each, as in 50,20,12. "
        "The name of a table, such as fast27, will do.",
        show_default="the checkpoint's own",
    ),
]
Guide = Annotated[
    str | None,
    typer.Option(
        metavar="X[,X,X]",
        help="How closely to follow the prompt, likewise; 1 is no guidance.",
        show_default="the checkpoint's own",
    ),
]
GuideInterval = Annotated[
    str | None,
    typer.Option(
        "--guidance-interval",
        metavar="LOW-HIGH[,...]",
        help="Guide only from timestep LOW on and below HIGH of training's 1000, the largest the noisiest, in all "
        "stages or in each its own; at others a step is half the work.",
        show_default="at all",
    ),
]
ColorFix = Annotated[
    bool | None,
    typer.Option(
        "--color-fix/--no-color-fix",
        help="Enlarged pictures keep the colours of the small one in large areas, or not.",
        show_default="the checkpoint's own",
    ),
]
QualityName = Annotated[
    str | None,
    typer.Option(
        "--quality",
        metavar="draft|standard|quality",
        help="With which samplers and in how many steps; --steps is stronger. docs/speed.md has what each costs.",
        show_default="the checkpoint's own",
    ),
]
Negative = Annotated[str | None, typer.Option(help="What the picture should not show.", show_default=False)]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="64|256|1024|WxH",
        help="Side in pixels: that of one of the cascade's stages, after which it stops. Or width and height of the "
        "picture that comes out last, as in 1536x1024; any will do.",
        show_default="the largest, 1024 px",
    ),
]
Count = Annotated[int, typer.Option(min=1, help="How many pictures, with the seeds SEED, SEED + 1, ...")]
Batch = Annotated[
    int,
    typer.Option(
        min=1,
        help="How many to paint at once: faster on a GPU. One at a time, a picture is the same to the last bit with "
        "and without --count.",
    ),
]
Profiled = Annotated[
    bool,
    typer.Option(
        "--profile", help="Say on stderr where the time went: by stage and part, and the share that arithmetic needs."
    ),
]
StagesDir = Annotated[
    Path | None,
    typer.Option(help="Keep the pictures of the stages before the last here, as picture-64.png.", show_default=False),
]


def generate(
    prompt: Prompt,
    output: Output = Path("picture.png"),
    seed: Seed = 0,
    quality: QualityName = None,
    steps: Steps = None,
    guidance: Guide = None,
    guidance_interval: GuideInterval = None,
    color_fix: ColorFix = None,
    negative_prompt: Negative = None,
    size: Size = None,
    count: Count = 1,
    batch: Batch = 1,
    stages_dir: StagesDir = None,
    model: Models = None,
    variant: Variant = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    engine: EngineName = "auto",
    device: Device = "auto",
    vram: Vram = None,
    ram: Ram = None,
    threads: Threads = None,
    profile: Profiled = False,
    quiet: Quiet = False,
) -> None:
    """Draw a picture of what a text says.

    The file holds the prompt, the seed and all else that made the picture: `floyd info` prints it.
    """
    with refusing():
        check_text("prompt", prompt)
        if not prompt.strip():
            raise ValueError("The prompt is empty: say what the picture shows.")
        check_text("negative prompt", negative_prompt or "")
        files = Files.checked(output, count, stages_dir)
        settings = Settings.parsed(
            steps=steps, guidance=guidance, guidance_interval=guidance_interval, color_fix=color_fix
        )
        wanted = parsed_size(size)
        cascade = load(
            model,
            variant=variant,
            dtype=dtype,
            device=device,
            threads=threads,
            quality=quality,
            quantization=quantization,
            engine=engine,
            vram=vram,
            ram=ram,
            size=wanted,
            count=min(batch, count),
        )
        sizes = {name: written(sides, cascade.sizes[name]) for name, sides in cascade.sizes_for(wanted).items()}
        options = settings.options(list(sizes))
        calls = [
            cascade.run(
                prompt,
                negative_prompt=negative_prompt,
                size=wanted,
                seed=seed + first,
                count=min(batch, count - first),
                options=options,
            )
            for first in range(0, count, batch)
        ]
    story = {
        "prompt": prompt,
        **({} if negative_prompt is None else {"negative_prompt": negative_prompt}),
        "model": name_of(model),
        "model_hash": hash_of(model),
        **({} if variant is None else {"variant": variant}),
        **({} if quality is None else {"quality": quality}),
        **({} if color_fix is None else {"color_fix": "on" if color_fix else "off"}),
        **({} if quantization is None else {"quantization": quantization}),
        **({} if (engines := engines_of(cascade)) is None else {"engine": engines}),
        "dtype": str(cascade.stages["stage_1"].dtype).removeprefix("torch."),
        "device": cascade.stages["stage_1"].device.type,
    }
    done, watch = 0, cascade.profile() if profile else None
    try:
        with progress(quiet=quiet) as bars, watch or nullcontext():
            for call in calls:
                result, num_steps = painted(call, bars, _nth(done, batch, count))
                histories = histories_of(cascade, options, num_steps, sizes)
                for i, own_seed in enumerate(result.seeds):
                    files.save(done, result, i, {**story, "seed": str(own_seed)}, histories)
                    done += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {done} of {count} pictures were finished.") from None
    if not quiet:
        for index in range(count):
            print(files.path(index))
    if watch is not None:
        print(watch, file=sys.stderr)


def check_text(name: str, text: str) -> None:
    """The file is to hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The {name} is not valid UTF-8: {text!a}.") from error


def painted(events: Iterator[Event], bars: Bars, which: str) -> tuple[CascadeResult, dict[str, int]]:
    """What the events end with, and how many steps each stage took."""
    from floyd.pipelines.events import Done, StageStarted, StepDone
    from floyd.pipelines.sizes import shown

    num_steps: dict[str, int] = {}
    for event in events:
        if isinstance(event, StageStarted):
            num_steps[event.stage] = event.num_steps
            bars.start(f"{which}{shown((event.width, event.height))}", event.num_steps)
        elif isinstance(event, StepDone):
            bars.step()
        elif isinstance(event, Done):
            return event.result, num_steps
    raise AssertionError("a cascade ends with Done")


def parsed_size(text: str | None) -> int | tuple[int, int] | None:
    """What `--size` says, as the cascade takes it; whether it can be made is the cascade's to say."""
    if text is None:
        return None
    if match := re.fullmatch(r"\s*(\d+)(?:\s*[x×]\s*(\d+))?\s*", text, re.IGNORECASE | re.ASCII):
        width, height = match.groups()
        return int(width) if height is None else (int(width), int(height))
    raise ValueError(f"--size must be one number of pixels, or width and height as in 384x256; got {text!r}.")


def written(sides: tuple[int, int], own_side: int) -> str:
    """As `parsed_size` reads it: one number if it is what the stage paints by itself."""
    return str(own_side) if sides == (own_side, own_side) else f"{sides[0]}x{sides[1]}"


def histories_of(
    cascade: Cascade,
    options: Mapping[str, Mapping[str, Any]],
    num_steps: Mapping[str, int],
    sizes: Mapping[str, str],
) -> dict[str, dict[str, str]]:
    """For each stage that ran, what makes its picture again: all values up to it, as the options take them."""
    from floyd.pipelines.order import merged

    steps, guidance, intervals, histories = [], [], [], {}
    is_restricted = False
    for name, count in num_steps.items():
        told = merged(cascade.presets.get(name, {}), options[name])
        default = inspect.signature(type(cascade.stages[name]).__call__).parameters["guidance_scale"].default
        table = told.get("timesteps")
        steps.append(table if isinstance(table, str) else str(count))
        guidance.append(f"{told.get('guidance_scale', default):g}")
        whole = (0, cascade.stages[name].scheduler.config.num_train_timesteps)
        intervals.append(told.get("guidance_interval") or whole)
        is_restricted = is_restricted or tuple(intervals[-1]) != whole
        histories[name] = {
            "size": sizes[name],
            "steps": ",".join(steps),
            "guidance": ",".join(guidance),
            **({"guidance_interval": ",".join(map(said, intervals))} if is_restricted else {}),
        }
    return histories


@dataclass(frozen=True)
class Files:
    """Where the pictures go."""

    output: Path
    count: int
    stages_dir: Path | None

    @classmethod
    def checked(cls, output: Path, count: int, stages_dir: Path | None) -> Files:
        """Whatever would go wrong after the work goes wrong before it."""
        if output.suffix.lower() != ".png":
            raise ValueError(f"{output} must end in .png: pictures are written as PNG, which keeps what made them.")
        if output.is_dir():
            raise ValueError(f"{output} is a folder; name a file in it.")
        if not output.parent.is_dir():
            raise ValueError(f"There is no folder {output.parent}: make it first, or write elsewhere.")
        if not os.access(output.parent, os.W_OK):
            raise ValueError(f"The folder {output.parent} may not be written to: write elsewhere.")
        if stages_dir is not None:
            if stages_dir.exists() and not stages_dir.is_dir():
                raise ValueError(f"--stages-dir {stages_dir} is a file; name a folder.")
            if not stages_dir.is_dir() and not stages_dir.parent.is_dir():
                raise ValueError(f"There is no folder {stages_dir.parent} to make {stages_dir.name} in.")
        return cls(output, count, stages_dir)

    def path(self, index: int) -> Path:
        """picture.png, or of several picture-0.png; with so many digits that names sort as numbers do."""
        if self.count == 1:
            return self.output
        digits = len(str(self.count - 1))
        return self.output.with_stem(f"{self.output.stem}-{index:0{digits}}")

    def save(
        self,
        index: int,
        result: CascadeResult,
        place: int,
        story: Mapping[str, str],
        histories: Mapping[str, Mapping[str, str]],
    ) -> None:
        """The `index`-th picture of all, which is the `place`-th of this result, and what the stages before made."""
        from floyd import __version__
        from floyd.images.metadata import save_png

        *before, last = result.stages
        end = {"Software": f"floyd {__version__}"}
        if self.stages_dir is not None:
            self.stages_dir.mkdir(exist_ok=True)
            for name in before:
                path = self.stages_dir / f"{self.path(index).stem}-{histories[name]['size']}.png"
                save_png(result.stages[name][place], path, {**story, **histories[name], **end})
        save_png(result.stages[last][place], self.path(index), {**story, **histories[last], **end})


def _nth(done: int, batch: int, count: int) -> str:
    """Which of several pictures it is about."""
    if count == 1:
        return ""
    last = min(done + batch, count)
    return f"{done + 1}/{count}  " if last == done + 1 else f"{done + 1}-{last}/{count}  "
