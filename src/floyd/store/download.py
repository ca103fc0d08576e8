"""What of a repository is missing here: planned first, so that its size is known, and then fetched.

What lies in the hub's cache afterwards is what its own client would have left there: blobs under their hashes, links to
them in the commit's folder, and the commit under the branch's name.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from floyd.errors import CheckpointError, DownloadError
from floyd.store import hub
from floyd.store.advice import GO_ONLINE, asked, failures, translated
from floyd.store.files import replacing, told_size
from floyd.store.layout import INDEX_NAME, ModelIndex, index_of
from floyd.store.source import Source
from floyd.store.transfer import Blob, Patience, Watch, carry, locked, part_of, patiently, size_of

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_UNSAFE = re.compile(r"[\\:]|(^|/)\.\.?(/|$)")  # what some file system takes for more than a name
_BRIEF, _STUBBORN = Patience(retries=2), Patience()

_T = TypeVar("_T")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. A mirror may list names alone."""

    name: str
    size: int = 0
    digest: str | None = None


@dataclass(frozen=True)
class Plan:
    """The files of a repository that are wanted, and how much of them is here."""

    source: Source
    commit: str
    index: ModelIndex | None  # None for a single model
    files: tuple[RemoteFile, ...]

    @property
    def root(self) -> Path:
        return self.source.cache_root / repository_folder(self.source.id)

    @property
    def folder(self) -> Path:
        """Where the files will lie under their names."""
        return self.root / "snapshots" / self.commit

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def is_measured(self) -> bool:
        return all(file.digest is not None for file in self.files)

    @property
    def contents(self) -> dict[str, RemoteFile]:
        """By hash: two names may have one content."""
        return {file.digest: file for file in self.files if file.digest is not None}

    @property
    def total(self) -> int:
        return sum(file.size for file in self.contents.values())

    @property
    def present(self) -> int:
        """How many bytes are here, of whole files and of parts."""
        return sum(self.present_of(file) for file in self.contents.values())

    @property
    def missing(self) -> int:
        return self.total - self.present

    def present_of(self, file: RemoteFile) -> int:
        if self.has(file):
            return file.size
        kept = 0 if file.digest is None else size_of(part_of(file.digest, self.blobs))
        return kept if kept <= file.size else 0

    def has(self, file: RemoteFile) -> bool:
        """Whether the whole file is here, under its name or its hash. A torn one is as good as none."""
        if file.digest is None:
            return False
        return any(
            path.is_file() and size_of(path) == file.size
            for path in (self.folder / file.name, self.blobs / file.digest)
        )


def components_of(index: ModelIndex) -> list[str]:
    """Those that the pipeline is not built without."""
    return [name for name, kind in index.components.items() if kind is not None]


def repository_folder(repository: str) -> str:
    """Under which name the hub's cache keeps it."""
    return f"models--{repository.replace('/', '--')}"


def plan(
    source: Source,
    *,
    components: Iterable[str] | None = None,
    without: Iterable[str] = (),
    variant: str | None = None,
    use_safetensors: bool | None = None,
    patience: Patience = _BRIEF,
    on_note: Callable[[str], None] = lambda note: None,
) -> Plan:
    """Ask the hub what is needed to load the repository, or these components of it, offline.

    `without` may name what the repository does not have.
    """
    if source.folder() is not None:
        raise ValueError(f"{source.id} is a folder of this machine; there is nothing to download.")
    if source.is_offline:
        raise DownloadError(f"{source.id} cannot be downloaded: floyd is offline. {GO_ONLINE}")
    watch = Watch(lambda count: None, on_note, threading.Event())
    commit, listed = asked(source, lambda: patiently(lambda: _listed(source), patience, watch))
    index = None
    if INDEX_NAME in listed:
        content = asked(source, lambda: patiently(lambda: _read(source, commit, INDEX_NAME), patience, watch))
        index = index_of(content, f"{source.id}/{INDEX_NAME}")
    names = hub.selected(
        source,
        index,
        list(listed),
        components=_wanted(source, index, components, without),
        variant=variant,
        use_safetensors=use_safetensors,
    )
    return Plan(source, commit, index, tuple(listed[name] for name in names))


def fetch(
    plan: Plan,
    *,
    patience: Patience = _STUBBORN,
    workers: int = 4,
    on_bytes: Callable[[int], None] = lambda count: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """The folder with the plan's files in it. What came is kept if this ends early, and the next call goes on."""
    if not plan.is_measured:  # nothing to go by; the hub's own client does without
        return hub.fetch(plan.source, [file.name for file in plan.files])
    lock = threading.Lock()
    watch = Watch(_one_by_one(on_bytes, lock), _one_by_one(on_note, lock), threading.Event())
    try:
        _carry_all(plan, patience, workers, watch)
        for file in plan.files:
            assert file.digest is not None, "the plan is measured"
            _link(plan.blobs / file.digest, plan.folder / file.name, file.size)
        _write_ref(plan)
    except DownloadError:
        raise
    except failures() as error:
        raise translated(plan.source, error) from error
    return plan.folder


def check_space(plans: Iterable[Plan]) -> None:
    """Refuse what will not fit, before it begins."""
    needed: dict[Path, int] = {}
    for plan in plans:
        needed[plan.source.cache_root] = needed.get(plan.source.cache_root, 0) + plan.missing
    for root, wanted in needed.items():
        if wanted > (free := free_bytes(root)):
            raise DownloadError(
                f"{told_size(wanted)} are to be fetched, and {told_size(free)} are free in {root}: make room for "
                f"{told_size(wanted - free)} there, or choose another place with --cache-dir or HF_HOME."
            )


def check_access(source: Source) -> None:
    """DownloadError, with what to do, if the hub does not hand out the repository's files."""
    asked(source, lambda: _read(source, source.revision or "main", INDEX_NAME))


def free_bytes(folder: Path) -> int:
    """On the disk where the folder is, or will be."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


# ------------------------------------------------------------------------------------------------------- asking the hub


def _listed(source: Source) -> tuple[str, dict[str, RemoteFile]]:
    """The commit, and the files by name."""
    from huggingface_hub import HfApi

    api = HfApi(token=source.token, library_name="floyd")
    info = api.model_info(source.id, revision=source.revision, files_metadata=True, timeout=hub.TIMEOUT_S)
    if not info.sha or not _COMMIT.fullmatch(info.sha):
        raise CheckpointError(f"{source.id}: the hub names the commit {info.sha!r}; is HF_ENDPOINT a hub's address?")
    siblings = [sibling for sibling in info.siblings or [] if not _UNSAFE.search(sibling.rfilename)]
    return info.sha, {sibling.rfilename: _remote(sibling) for sibling in siblings}


def _remote(sibling: Any) -> RemoteFile:
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if sibling.size is None or digest is None or not _DIGEST.fullmatch(digest):
        return RemoteFile(sibling.rfilename)
    return RemoteFile(sibling.rfilename, sibling.size, digest)


def _read(source: Source, commit: str, name: str) -> dict[str, Any]:
    """A small file of JSON, without keeping it."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    url, headers = _address(source, commit, name), _headers(source)
    answer = get_session().get(url, headers=headers, timeout=hub.TIMEOUT_S)
    hf_raise_for_status(answer)
    try:
        content = answer.json()
    except ValueError as error:
        raise CheckpointError(f"{source.id}/{name} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source.id}/{name} must hold a JSON object, got a {type(content).__name__}.")
    return content


def _address(source: Source, commit: str, name: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(source.id, name, revision=commit)


def _headers(source: Source) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(token=source.token, library_name="floyd")


def _wanted(
    source: Source, index: ModelIndex | None, components: Iterable[str] | None, without: Iterable[str]
) -> list[str] | None:
    left_out = set(without)
    if components is None and not left_out:
        return None
    if index is None:
        raise ValueError(f"{source.id} is a single model and has no components to choose from.")
    chosen = components_of(index) if components is None else list(components)
    return [name for name in chosen if name not in left_out]


# ------------------------------------------------------------------------------------------------------------- fetching


def _carry_all(plan: Plan, patience: Patience, workers: int, watch: Watch) -> None:
    """Several at once, the largest first; the first failure, or Ctrl-C, ends all."""
    todo = sorted((f for f in plan.contents.values() if not plan.has(f)), key=lambda f: f.size, reverse=True)
    headers = _headers(plan.source)
    with ThreadPoolExecutor(workers) as pool:
        futures: list[Future[None]] = [pool.submit(_carry, plan, file, headers, patience, watch) for file in todo]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            watch.stop.set()
            for future in futures:
                future.cancel()
            raise


def _carry(plan: Plan, file: RemoteFile, headers: dict[str, str], patience: Patience, watch: Watch) -> None:
    assert file.digest is not None, "the plan is measured"
    source, full_name = plan.source, f"{plan.source.id}/{file.name}"
    try:
        plan.blobs.mkdir(parents=True, exist_ok=True)
        present = plan.present_of(file)
        lock = source.cache_root / ".locks" / plan.root.name / f"{file.digest}.lock"
        with locked(lock, watch):
            if plan.has(file):  # by the process that had the lock
                watch.on_bytes(file.size - present)
                return
            blob = Blob(full_name, _address(source, plan.commit, file.name), file.digest, file.size)
            carry(blob, plan.blobs, headers=headers, patience=patience, watch=watch)
    except DownloadError:
        raise
    except failures() as error:
        kept = size_of(part_of(file.digest, plan.blobs))
        rest = f" {told_size(kept)} of {file.name} are kept, and the same again goes on from there." if kept else ""
        raise DownloadError(f"{translated(source, error)}{rest}") from error


def _one_by_one(tell: Callable[[_T], None], lock: threading.Lock) -> Callable[[_T], None]:
    """For who is called from several threads and does not know it."""

    def told(what: _T) -> None:
        with lock:
            tell(what)

    return told


def _link(blob: Path, name: Path, size: int) -> None:
    """The file under its name: a link, or a copy where there are none."""
    if name.is_file() and size_of(name) == size:
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)
    with suppress(OSError):  # Windows links for administrators alone
        name.symlink_to(os.path.relpath(blob, name.parent))
        return
    with suppress(OSError):  # and FAT links not at all
        os.link(blob, name)
        return
    with replacing(name) as temporary:
        shutil.copyfile(blob, temporary)


def _write_ref(plan: Plan) -> None:
    """Which commit the branch is at, for who asks offline."""
    branch = plan.source.revision or "main"
    if _COMMIT.fullmatch(branch):
        return
    path = plan.root / "refs" / branch
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(plan.commit)
