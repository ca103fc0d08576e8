"""From a path or a hub id to a local folder that holds the files to be read, and no others.

A repository of IF holds each network three to eight times over; only the asked-for components, in one format and one
variant, are fetched. Without a network, or when the hub refuses, the cache serves what it has.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from floyd.errors import CheckpointError
from floyd.store import layout, naming
from floyd.store.advice import absent, asked, failures, translated
from floyd.store.layout import INDEX_NAME, ModelIndex
from floyd.store.source import Source
from floyd.store.weights import no_such_variant

__all__ = ["Source", "cached_folder", "component", "fetch", "file", "names_in", "selected", "snapshot"]

log = logging.getLogger(__name__)

TIMEOUT_S = 30.0  # for the first answer
_SMALL = (".json", ".txt", ".model")  # configurations, vocabularies, sentencepiece models


def snapshot(
    path_or_id: str | os.PathLike[str],
    *,
    components: Iterable[str] | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """A pipeline's folder with the files of the named components, or of all that its index names.

    A local folder is used as it is. `variant` is checked for the whole pipeline: ValueError if no component comes in
    it, a logged warning about those that will be read from their plain files.
    """
    source = Source(path_or_id, revision, token, cache_dir, local_files_only, force_download)
    local = source.folder()
    index = layout.read_index(local or _fetch_index(source))
    names = _walk(local) if local else _listing(source)
    wanted = _wanted(index, components, source.id)
    if plain := _check_variant(source.id, index, wanted, names, variant, use_safetensors):
        log.warning(
            "%s mixes variants: %s will be read from plain files, as there are none of the variant %r.",
            source.id,
            ", ".join(plain),
            variant,
        )
    if local:
        return local
    return fetch(source, _files(source, index, wanted, names, variant, use_safetensors))


def selected(
    source: Source,
    index: ModelIndex | None,
    names: Sequence[str],
    *,
    components: Iterable[str] | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> list[str]:
    """Which of a repository's files `from_pretrained` reads; without an index, those of one model at the root."""
    if index is None:
        return _needed(source, "", _below(names, ""), variant, use_safetensors, with_weights=True)
    wanted = _wanted(index, components, source.id)
    _check_variant(source.id, index, wanted, names, variant, use_safetensors)
    return _files(source, index, wanted, names, variant, use_safetensors)


def _files(
    source: Source,
    index: ModelIndex,
    wanted: Sequence[str],
    names: Sequence[str],
    variant: str | None,
    use_safetensors: bool | None,
) -> list[str]:
    files = [INDEX_NAME]
    for name in wanted:
        kind, own = index.components[name], _below(names, name)
        used = variant if naming.choose(own, variant=variant, use_safetensors=use_safetensors) else None
        with_weights = kind is not None and layout.has_weights(kind)
        or_else = f" Or pass {name}=..., another pipeline's, or {name}=None to do without."
        files += _needed(source, name, own, used, use_safetensors, with_weights=with_weights, or_else=or_else)
    return files


def component(
    source: Source,
    subfolder: str | None,
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    with_weights: bool = True,
) -> Path:
    """One component's folder, which for a repository without `subfolder` is its root."""
    folder = source.folder()
    if folder is None:
        names = _listing(source)
        own = _below(names, subfolder or "")
        files = _needed(source, subfolder or "", own, variant, use_safetensors, with_weights=with_weights)
        folder = fetch(source, files)
    folder = folder / (subfolder or "")
    if not folder.is_dir():
        raise CheckpointError(f"{source.id} has no folder {subfolder!r}.")
    return folder


def names_in(source: Source, subfolder: str | None = None) -> list[str]:
    """The files in a folder or a repository, or directly in a subfolder of it."""
    local = source.folder()
    return _below(_walk(local) if local else _listing(source), subfolder or "")


def file(source: Source, name: str) -> Path:
    """One file of a folder or a repository, such as a LoRA's."""
    path = (source.folder() or fetch(source, [name])) / name
    if not path.is_file():
        raise CheckpointError(f"{source.id} has no file {name!r}.")
    return path


def _wanted(index: ModelIndex, components: Iterable[str] | None, place: str) -> list[str]:
    present = [name for name, kind in index.components.items() if kind is not None]
    if components is None:
        return present
    asked = list(components)
    if unknown := [name for name in asked if name not in present]:
        raise ValueError(f"{place} has no component {', '.join(unknown)}; it has {', '.join(present)}.")
    return asked


def _check_variant(
    place: str,
    index: ModelIndex,
    wanted: Sequence[str],
    names: Sequence[str],
    variant: str | None,
    use_safetensors: bool | None,
) -> list[str]:
    """The components whose weights come in no variant, if it is not the whole pipeline: that is a ValueError."""
    if variant is None:
        return []
    own = {n: _below(names, n) for n, kind in index.components.items() if kind and layout.has_weights(kind)}
    with_it = {n for n, files in own.items() if naming.choose(files, variant=variant, use_safetensors=use_safetensors)}
    if own and not with_it:
        found = sorted({other for files in own.values() for other in naming.variants(files)})
        raise ValueError(no_such_variant(place, variant, found))
    missing = [n for n in wanted if layout.has_precision(index.components[n]) and n not in with_it]
    return [n for n in missing if any(map(naming.is_weights, own[n]))]


def _needed(
    source: Source,
    prefix: str,
    names: Sequence[str],
    variant: str | None,
    use_safetensors: bool | None,
    *,
    with_weights: bool,
    or_else: str = "",
) -> list[str]:
    """The files of one component: the small ones, and one set of weights."""
    files = [name for name in names if name.endswith(_SMALL) and not naming.is_weights(name)]
    if not files:
        raise absent(source, f"no files for {prefix or 'a model at its root'} there", or_else=or_else)
    if with_weights:
        found = naming.choose(names, variant=variant, use_safetensors=use_safetensors)
        if found is None and variant is not None:
            raise ValueError(no_such_variant(f"{source.id}/{prefix}", variant, naming.variants(names)))
        if found is None or found.num_missing:
            raise absent(source, f"{prefix or 'its root'} has no complete weights there", or_else=or_else)
        files += [*found.files, *([found.index] if found.index else [])]
    return [f"{prefix}/{name}" if prefix else name for name in files]


def _below(names: Iterable[str], prefix: str) -> list[str]:
    """The files directly in a folder of the repository, without the folder's name."""
    start = f"{prefix}/" if prefix else ""
    return [name[len(start) :] for name in names if name.startswith(start) and "/" not in name[len(start) :]]


def _walk(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------ the hub's client


def _listing(source: Source) -> list[str]:
    """Every file of the repository; of its cached snapshot where the hub cannot be asked."""
    from huggingface_hub import HfApi

    if source.is_offline:
        return _walk(asked(source, lambda: _cached(source)))
    api = HfApi(token=source.token, library_name="floyd")
    try:
        info = api.model_info(source.id, revision=source.revision, timeout=TIMEOUT_S)
        return [file.rfilename for file in info.siblings or []]
    except failures() as error:
        try:
            names = _walk(_cached(source))
        except failures():
            raise translated(source, error) from error
        log.warning("The hub could not be asked about %s (%s); using the cache.", source.id, type(error).__name__)
        return names


def fetch(source: Source, files: Sequence[str], *, tolerant: bool = False) -> Path:
    """The snapshot folder, with these files in it."""
    from huggingface_hub import snapshot_download

    def download() -> Path:
        return Path(
            snapshot_download(
                source.id,
                revision=source.revision,
                token=source.token,
                cache_dir=source.cache,
                local_files_only=source.is_offline,
                force_download=source.force_download,
                allow_patterns=list(files),
                library_name="floyd",
            )
        )

    folder = asked(source, download)
    if not tolerant and (missing := [name for name in files if not (folder / name).is_file()]):
        raise absent(source, f"{missing[0]} is missing")
    return folder


def _fetch_index(source: Source) -> Path:
    folder = fetch(source, [INDEX_NAME], tolerant=True)
    if not (folder / INDEX_NAME).is_file():
        raise absent(source, f"no {INDEX_NAME} there, so no pipeline (a single model is loaded by its class)")
    return folder


def cached_folder(path_or_id: str | os.PathLike[str], **options: Any) -> Path | None:
    """A pipeline's folder as far as it is on this machine: a local one, or the hub's cache. Nothing is asked for."""
    source = Source(path_or_id, **options)
    if (local := source.folder()) is not None:
        return local
    try:
        folder = _cached(source)
    except failures():
        return None
    return folder if (folder / INDEX_NAME).is_file() else None


def _cached(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            source.id,
            revision=source.revision,
            cache_dir=source.cache,
            local_files_only=True,
            ignore_patterns=["*"],  # nothing need be there: what is needed is looked for afterwards
        )
    )
