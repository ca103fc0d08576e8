"""How weight files are named, and which of a folder's files make up one state dict. Names in, names out: no disk.

    diffusion_pytorch_model.safetensors                  one file
    diffusion_pytorch_model.fp16.safetensors             the same, variant fp16
    model-00001-of-00002.safetensors                     shards, listed by model.safetensors.index.json
    model.fp16-00001-of-00002.safetensors                shards of a variant, model.safetensors.index.fp16.json
    model-00001-of-00002.fp16.safetensors                the same in the older order, model.safetensors.fp16.index.json

Pickled files end in `.bin`; transformers' are then called `pytorch_model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Ours first; then transformers' names, which the safety checker shares.
BASES = ("diffusion_pytorch_model", "model", "pytorch_model")
SAFE, PICKLED = "safetensors", "bin"

_BASE = rf"(?P<base>{'|'.join(BASES)})"
_SUFFIX = rf"(?P<suffix>{SAFE}|{PICKLED})"
_WEIGHTS = re.compile(
    rf"{_BASE}(?:\.(?P<early>[\w-]+?))?(?:-(?P<number>\d{{5}})-of-(?P<total>\d{{5}}))?(?:\.(?P<late>[\w-]+))?\.{_SUFFIX}",
    re.ASCII,
)
_INDEX = re.compile(
    rf"{_BASE}(?:\.(?P<first>[\w-]+))?\.{_SUFFIX}(?:\.(?P<early>[\w-]+))?\.index(?:\.(?P<late>[\w-]+))?\.json", re.ASCII
)
_VARIANT = re.compile(r"[A-Za-z0-9_-]+")


class WeightFile(NamedTuple):
    """What one file name says."""

    name: str
    base: str
    variant: str | None
    suffix: str
    number: int = 0  # of this shard; 0 where the file holds everything
    total: int = 0
    is_late: bool = False  # the variant comes after the shard's number
    is_index: bool = False


@dataclass(frozen=True)
class WeightSet:
    """The files that together hold one state dict."""

    base: str
    variant: str | None
    suffix: str
    files: tuple[str, ...]
    index: str | None = None
    num_missing: int = 0  # shards that the names promise and the folder lacks


def parse(name: str) -> WeightFile | None:
    """What a file name says, or None if it is no weight file's."""
    if match := _INDEX.fullmatch(name):
        variants = [v for v in match.group("first", "early", "late") if v]
        if len(variants) <= 1:
            return WeightFile(name, match["base"], "".join(variants) or None, match["suffix"], is_index=True)
    elif match := _WEIGHTS.fullmatch(name):
        early, late = match["early"], match["late"]
        if not (early and late):
            shard = (int(match["number"]), int(match["total"])) if match["number"] else (0, 0)
            return WeightFile(name, match["base"], early or late, match["suffix"], *shard, is_late=bool(late))
    return None


def weights_name(base: str, suffix: str, *, variant: str | None = None, number: int = 0, total: int = 0) -> str:
    """The name that floyd writes: the variant before the shard's number, as transformers and diffusers do."""
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise ValueError(f"A variant is part of a file name, made of letters, digits, '_' and '-'; got {variant!r}.")
    shard = f"-{number:05d}-of-{total:05d}" if number else ""
    return f"{base}{f'.{variant}' if variant else ''}{shard}.{suffix}"


def index_name(base: str, suffix: str, *, variant: str | None = None) -> str:
    return f"{base}.{suffix}.index{f'.{variant}' if variant else ''}.json"


def choose(names: Iterable[str], *, variant: str | None, use_safetensors: bool | None) -> WeightSet | None:
    """The files to read: safetensors before pickles, one file before shards, complete sets before torn ones.

    Only this very variant is considered; to fall back to the plain files is the caller's decision.
    """
    files = [file for name in sorted(names) if (file := parse(name)) and file.variant == variant]
    suffixes = {None: (SAFE, PICKLED), True: (SAFE,), False: (PICKLED,)}[use_safetensors]
    found = [
        weight_set
        for suffix in suffixes
        for base in BASES
        for weight_set in _sets([f for f in files if f.suffix == suffix and f.base == base])
    ]
    return next((s for s in found if not s.num_missing), found[0] if found else None)


def _sets(files: Sequence[WeightFile]) -> list[WeightSet]:
    """The sets among files of one base, variant and suffix: the single file, then shards in either order of names."""
    if not files:
        return []
    _, base, variant, suffix, *_ = files[0]
    index = next((f.name for f in files if f.is_index), None)
    sets = [WeightSet(base, variant, suffix, (f.name,)) for f in files if not f.is_index and not f.number]
    shards = [f for f in files if f.number]
    for is_late, total in sorted({(f.is_late, f.total) for f in shards}):
        own = sorted(f for f in shards if (f.is_late, f.total) == (is_late, total))
        sets.append(WeightSet(base, variant, suffix, tuple(f.name for f in own), index, num_missing=total - len(own)))
    if index and not sets:
        sets.append(WeightSet(base, variant, suffix, (), index, num_missing=1))
    return sets


def variants(names: Iterable[str]) -> list[str]:
    """The variants that a folder's weight files come in, the plain one aside."""
    return sorted({file.variant for name in names if (file := parse(name)) and file.variant})


def is_weights(name: str) -> bool:
    return parse(name) is not None
