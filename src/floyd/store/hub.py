"""From a path or a hub id to a local folder that holds the files to be read, and no others.

A repository of IF holds each network three to eight times over; only the asked-for components, in one format and one
variant, are fetched. Without a network, or when the hub refuses, the cache serves what it has.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from floyd.errors import CheckpointError, DownloadError
from floyd.store import layout, naming
from floyd.store.layout import INDEX_NAME, ModelIndex
from floyd.store.weights import no_such_variant

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_SMALL = (".json", ".txt", ".model")  # configurations, vocabularies, sentencepiece models

_T = TypeVar("_T")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from: a folder, or a repository and how to ask the hub for it."""

    path_or_id: str | os.PathLike[str]
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False

    def folder(self) -> Path | None:
        """The local folder, or None for an id of the hub. ValueError for what is neither."""
        path = Path(self.path_or_id).expanduser()
        if path.is_dir():
            return path
        if path.is_file():
            raise ValueError(f"{path} is a file; give the folder that holds config.json or {INDEX_NAME}.")
        if not _ID.fullmatch(os.fspath(self.path_or_id)):
            raise ValueError(f"{self.path_or_id!s} is neither an existing folder nor a hub id of the form 'org/name'.")
        return None

    @property
    def cache(self) -> Path | None:
        return None if self.cache_dir is None else Path(self.cache_dir)

    @property
    def id(self) -> str:
        return os.fspath(self.path_or_id)

    def __repr__(self) -> str:  # the token stays out of logs
        return f"Source({self.id!r}, revision={self.revision!r})"


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
    _check_variant(source.id, index, wanted, names, variant, use_safetensors)
    if local:
        return local
    files = [INDEX_NAME]
    for name in wanted:
        kind, own = index.components[name], _below(names, name)
        used = variant if naming.choose(own, variant=variant, use_safetensors=use_safetensors) else None
        with_weights = kind is not None and layout.has_weights(kind)
        files += _needed(source, name, own, used, use_safetensors, with_weights=with_weights)
    return _fetch(source, files)


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
        folder = _fetch(source, files)
    folder = folder / (subfolder or "")
    if not folder.is_dir():
        raise CheckpointError(f"{source.id} has no folder {subfolder!r}.")
    return folder


def file(source: Source, name: str) -> Path:
    """One file of a folder or a repository, such as a LoRA's."""
    path = (source.folder() or _fetch(source, [name])) / name
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
) -> None:
    if variant is None:
        return
    own = {n: _below(names, n) for n, kind in index.components.items() if kind and layout.has_weights(kind)}
    with_it = {n for n, files in own.items() if naming.choose(files, variant=variant, use_safetensors=use_safetensors)}
    if own and not with_it:
        found = sorted({other for files in own.values() for other in naming.variants(files)})
        raise ValueError(no_such_variant(place, variant, found))
    if plain := [n for n in wanted if n in own and n not in with_it and any(map(naming.is_weights, own[n]))]:
        log.warning(
            "%s mixes variants: %s will be read from plain files, as there are none of the variant %r.",
            place,
            ", ".join(plain),
            variant,
        )


def _needed(
    source: Source,
    prefix: str,
    names: Sequence[str],
    variant: str | None,
    use_safetensors: bool | None,
    *,
    with_weights: bool,
) -> list[str]:
    """The files of one component: the small ones, and one set of weights."""
    files = [name for name in names if name.endswith(_SMALL) and not naming.is_weights(name)]
    if not files:
        raise _absent(source, f"no files for {prefix or 'a model at its root'} there")
    if with_weights:
        found = naming.choose(names, variant=variant, use_safetensors=use_safetensors)
        if found is None and variant is not None:
            raise ValueError(no_such_variant(f"{source.id}/{prefix}", variant, naming.variants(names)))
        if found is None or found.num_missing:
            raise _absent(source, f"{prefix or 'its root'} has no complete weights there")
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

    if not _is_offline(source):
        try:
            info = HfApi(token=source.token, library_name="floyd").model_info(source.id, revision=source.revision)
            return [file.rfilename for file in info.siblings or []]
        except _failures() as error:
            try:
                names = _walk(_cached(source))
            except _failures():
                raise _translated(source, error) from error
            log.warning("The hub could not be asked about %s (%s); using the cache.", source.id, type(error).__name__)
            return names
    return _walk(_asked(source, lambda: _cached(source)))


def _fetch(source: Source, files: Sequence[str], *, tolerant: bool = False) -> Path:
    """The snapshot folder, with these files in it."""
    from huggingface_hub import snapshot_download

    def download() -> Path:
        return Path(
            snapshot_download(
                source.id,
                revision=source.revision,
                token=source.token,
                cache_dir=source.cache,
                local_files_only=_is_offline(source),
                force_download=source.force_download,
                allow_patterns=list(files),
                library_name="floyd",
            )
        )

    folder = _asked(source, download)
    if not tolerant and (missing := [name for name in files if not (folder / name).is_file()]):
        raise _absent(source, f"{missing[0]} is missing")
    return folder


def _fetch_index(source: Source) -> Path:
    folder = _fetch(source, [INDEX_NAME], tolerant=True)
    if not (folder / INDEX_NAME).is_file():
        raise _absent(source, f"no {INDEX_NAME} there, so no pipeline (a single model is loaded by its class)")
    return folder


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


def _asked(source: Source, ask: Callable[[], _T]) -> _T:
    try:
        return ask()
    except _failures() as error:
        raise _translated(source, error) from error


def _is_offline(source: Source) -> bool:
    from huggingface_hub import constants

    return source.local_files_only or bool(constants.HF_HUB_OFFLINE)


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises when it cannot deliver. Its HTTP library changed names, hence the search for one."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    http_errors = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (OSError, EntryNotFoundError, *http_errors)


def _absent(source: Source, what: str) -> CheckpointError:
    if not _is_offline(source):
        return CheckpointError(f"{source.id}: {what}.")
    return DownloadError(f"{source.id}: {what}, and floyd is offline. {_GO_ONLINE}")


_GO_ONLINE = "Load it once with a network (without local_files_only and HF_HUB_OFFLINE), or give a local folder."


def _translated(source: Source, error: Exception) -> DownloadError:
    """Say what to do about a failure of the hub's client."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{source.id}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # not in the cache either; why the cache had to do is what matters
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        advice = (
            f"is gated: log in to {page} and accept the licence there, then pass token=... or run `hf auth login`. "
            "A fine-grained token needs the permission to read gated repositories."
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        advice = f"has no revision {source.revision!r}: see {page}/refs."
    elif isinstance(error, errors.RepositoryNotFoundError):
        advice = f"was not found, or is private: check the name at {page}, and pass token=... if it is private."
    elif isinstance(error, errors.LocalTokenNotFoundError):
        advice = "was asked for with token=True, but no token is stored: run `hf auth login` or pass the token."
    elif _is_offline(source):
        cache = source.cache_dir or constants.HF_HUB_CACHE
        advice = f"is not in the cache ({cache}), and floyd is offline. {_GO_ONLINE}"
    elif status in {401, 403}:
        advice = f"is not open to you (HTTP {status}): pass a valid token=... or run `hf auth login`, and see {page}."
    elif status is not None:
        advice = f"could not be fetched, the hub answered HTTP {status}: try again later, or give a local folder."
    else:
        advice = f"could not be fetched ({type(error).__name__}: {error}): check the network, or give a local folder."
    return DownloadError(f"{source.id} {advice}")
