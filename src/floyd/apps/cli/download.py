"""`floyd download`: the files that a model needs, and no others, into the hub's cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from floyd.apps.cli.models import Quiet
from floyd.apps.cli.progress import progress
from floyd.apps.cli.refusals import refusing, say

ModelIds = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="Ids on the hub, as in DeepFloyd/IF-I-XL-v1.0; or if-m, if-l, if-xl for all three stages of a cascade.",
        show_default=False,
    ),
]
Variant = Annotated[
    str | None, typer.Option(help="Which files of the weights: fp16 is half as large.", show_default="the plain ones")
]
Components = Annotated[
    str | None, typer.Option(metavar="NAME[,NAME...]", help="Only these, as in unet,scheduler.", show_default="all")
]
Without = Annotated[
    str | None,
    typer.Option(metavar="NAME[,NAME...]", help="All but these, as in text_encoder.", show_default=False),
]
Revision = Annotated[str | None, typer.Option(help="A branch, a tag or a commit.", show_default="main")]
Token = Annotated[
    str | None,
    typer.Option(
        help="A token of your account on the hub. Others may see it here: better `hf auth login`, or HF_TOKEN.",
        show_default="the stored one",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Where to put the files; set HF_HUB_CACHE to it to use them.", show_default="the hub's cache"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the files and their sizes, and fetch nothing.")]
Retries = Annotated[
    int, typer.Option(min=0, help="How often to try again when the connection breaks off or the hub stumbles.")
]

KEPT = "interrupted; what came is kept, and the same command goes on from there."


def download(
    models: ModelIds,
    variant: Variant = None,
    components: Components = None,
    without: Without = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    dry_run: DryRun = False,
    retries: Retries = 5,
    quiet: Quiet = False,
) -> None:
    """Fetch a model's weights, so that it can be used offline.

    Only what will be read is fetched: one variant, safetensors where there are some, and of a cascade the text encoder
    once. What is here is not fetched again, and a file that broke off is gone on with.
    """
    tell: Callable[[str], None] = (lambda note: None) if quiet else say
    with refusing():
        from floyd.apps.download import lines, next_command, plans
        from floyd.store.download import check_space, fetch
        from floyd.store.transfer import Patience

        wanted = plans(
            models,
            variant=variant,
            components=None if components is None else parsed_names(components),
            without=[] if without is None else parsed_names(without),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            on_note=tell,
        )
    if dry_run:
        print("\n".join(lines(wanted)))
        return
    check_space(wanted)
    try:
        with progress(quiet=quiet, in_bytes=True) as bars:
            for one in wanted:
                bars.start(one.source.id, one.total, done=one.present)
                fetch(one, patience=Patience(retries=retries), on_bytes=bars.step, on_note=bars.note)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(KEPT) from None
    if not quiet:
        for one in wanted:
            print(one.folder)
        if command := next_command(models, wanted, variant):
            say(f"now: {command}")


def parsed_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"Components are named as in unet,scheduler; got {text!r}.")
    return names
