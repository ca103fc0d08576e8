"""What `floyd download` fetches: one repository or several, and of a cascade's stages nothing twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from floyd.apps.names import expanded
from floyd.store.download import Plan, components_of, free_bytes, plan
from floyd.store.files import told_size
from floyd.store.source import Source

SHARED = ("text_encoder", "safety_checker")  # a cascade's second stage is given its first stage's


def plans(
    models: Sequence[str],
    *,
    variant: str | None = None,
    components: Sequence[str] | None = None,
    without: Sequence[str] = (),
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[Plan]:
    """What to fetch of each model. The hub is asked about all before anything is fetched."""
    ids = expanded(models)
    if revision is not None and len(ids) > 1:
        raise ValueError(f"A revision is one model's, and these are {len(ids)}: {', '.join(ids)}. Name one of them.")
    if components is not None and without:
        raise ValueError("Name either the components to fetch or those to leave out, not both.")
    made: list[Plan] = []
    for model in ids:
        source = Source(model, revision=revision, token=token, cache_dir=cache_dir)
        one = plan(source, components=components, without=without, variant=variant, on_note=on_note)
        made.append(one if components is not None else _without_shared(one, made))
    present = list(dict.fromkeys(name for one in made for name in _components(one)))
    if unknown := [name for name in without if name not in present]:
        raise ValueError(f"{', '.join(ids)} has no component {', '.join(unknown)}; it has {', '.join(present)}.")
    return made


def _components(plan: Plan) -> list[str]:
    return [] if plan.index is None else components_of(plan.index)


def _without_shared(second: Plan, before: Sequence[Plan]) -> Plan:
    """A second stage without what the first stage, fetched along with it, will lend it."""
    lent = [name for name in SHARED if any(_lends(first, second, name) for first in before)]
    kept = tuple(file for file in second.files if file.name.partition("/")[0] not in lent)
    return replace(second, files=kept)


def _lends(first: Plan, second: Plan, component: str) -> bool:
    if first.index is None or second.index is None:
        return False
    return (
        "SuperResolution" not in first.index.class_name
        and second.index.class_name.startswith("IF")
        and "SuperResolution" in second.index.class_name
        and first.index.components.get(component) == second.index.components.get(component)
        and any(file.name.startswith(f"{component}/") for file in first.files)
    )


def left_out(plan: Plan) -> list[str]:
    """The components of which nothing is fetched."""
    fetched = {file.name.partition("/")[0] for file in plan.files}
    return [name for name in _components(plan) if name not in fetched]


def lines(plans: Sequence[Plan]) -> list[str]:
    """Every file and its size, and what of it is here."""
    told = []
    for one in plans:
        files, here = f"{len(one.files)} files", told_size(one.present)
        told.append(
            f"{one.source.id}: {files}, {told_size(one.total)}, of which {here} are here"
            if one.is_measured
            else f"{one.source.id}: {files}, whose sizes this hub does not tell"
        )
        for file in sorted(one.files, key=lambda file: (-file.size, file.name)):
            size = told_size(file.size) if file.digest is not None else "?"
            told.append(f"{size:>9}  {file.name}{_here(one.present_of(file), file.size)}")
        if absent := left_out(one):
            told.append(f"{'':9}  without {', '.join(absent)}")
    root = plans[0].source.cache_root
    missing = sum(one.missing for one in plans)
    told.append(f"to fetch: {told_size(missing)}; free: {told_size(free_bytes(root))} in {root}")
    return told


def _here(present: int, size: int) -> str:
    if not present:
        return ""
    return "  (here)" if present == size else f"  ({told_size(present)} are here)"


def next_command(models: Sequence[str], plans: Sequence[Plan], variant: str | None) -> str | None:
    """How to draw with what was fetched, if a first stage was."""
    first = plans[0].index
    if first is None or first.class_name != "IFPipeline" or len(plans) > 3:
        return None
    options = "".join(f" --model {model}" for model in models)
    if variant is not None:
        options += f" --variant {variant}" + (" --dtype float16" if variant == "fp16" else "")
    return f'floyd generate "a photo of a red panda"{options}'
