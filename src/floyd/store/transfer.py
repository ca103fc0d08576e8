"""One large file over HTTP: kept as far as it came, gone on with at the next call, and checked when it is whole.

The hub's client throws a partial file away when a download ends early; of IF, that can be 10 GB.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha1, sha256
from pathlib import Path
from typing import TypeVar

from floyd.errors import DownloadError
from floyd.store.advice import failures, status_of, transport_failures, wait_asked_for

_SHA256_LENGTH = 64  # of a large file's name among the blobs; a small one's is git's, a SHA-1
_PASSING = {408, 429, 500, 502, 503, 504}

_T = TypeVar("_T")


class StoppedError(Exception):
    """Somebody asked for an end, by the event that they gave."""


@dataclass(frozen=True)
class Patience:
    """How often to try again, and how long to wait in between."""

    retries: int = 5  # in a row without a new byte
    first_s: float = 1.0  # then twice as long each time
    most_s: float = 60.0  # a hub that wants to be left alone for longer gets its wish: the error says so

    def wait_s(self, failed: int, error: Exception) -> float | None:
        """Before the next try, after so many failures in a row; None to give up."""
        asked_for = wait_asked_for(error)
        if failed > self.retries or (asked_for or 0.0) > self.most_s:
            return None
        return asked_for if asked_for is not None else min(self.first_s * 2 ** (failed - 1), self.most_s)


@dataclass(frozen=True)
class Blob:
    """A file's content: where it is offered, and the name that its hash gives it."""

    name: str  # for complaints
    url: str
    digest: str
    size: int


@dataclass(frozen=True)
class Watch:
    """Who is told what happens, and can end it."""

    on_bytes: Callable[[int], None]  # so many more are here; negative when some had to be thrown away
    on_note: Callable[[str], None]
    stop: threading.Event


def patiently(ask: Callable[[], _T], patience: Patience, watch: Watch) -> _T:
    """What is asked for, from a hub that answers; one that cannot be reached at all is an error at once."""
    failed = 0
    while True:
        try:
            return ask()
        except failures() as error:
            failed += 1
            if status_of(error) not in _PASSING:
                raise
            _rest(patience, failed, error, watch)


def carry(blob: Blob, folder: Path, *, headers: Mapping[str, str], patience: Patience, watch: Watch) -> Path:
    """The blob in the folder of blobs, from where an earlier call left off. Its hash is checked."""
    whole, part = folder / blob.digest, _Part(part_of(blob.digest, folder), blob)
    failed, reached = 0, part.size
    while True:
        try:
            _go_on(blob, part, headers, watch)
            break
        except failures() as error:
            if not _may_pass(error):
                raise
            failed = 1 if part.size > reached else failed + 1
            reached = part.size
            _rest(patience, failed, error, watch)
    if part.digest != blob.digest or size_of(part.path) != blob.size:
        watch.on_bytes(-part.restart())
        raise DownloadError(f"{blob.name} arrived damaged and was deleted: run the same again.")
    os.replace(part.path, whole)
    return whole


def part_of(digest: str, folder: Path) -> Path:
    """The name under which the hub's older clients, too, look for what they had begun."""
    return folder / f"{digest}.incomplete"


def size_of(path: Path) -> int:
    """0 for what is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def locked(path: Path, watch: Watch) -> Iterator[None]:
    """One process at a time, the hub's own client included; the others wait."""
    from huggingface_hub.utils import WeakFileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(WeakFileLock(path, timeout=0.5))
                break
            except TimeoutError:
                watch.on_note("another process is fetching the same file; waiting")
                if watch.stop.is_set():
                    raise StoppedError from None
        yield


class _Part:
    """What came of a file, and its hash as the hub has it: SHA-256 of a large file, git's SHA-1 of a small one."""

    def __init__(self, path: Path, blob: Blob) -> None:
        self.path, self._blob = path, blob
        if size_of(path) > blob.size:
            path.unlink()
        path.touch()
        self._begin()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                self._take(chunk)

    def _begin(self) -> None:
        self.size = 0
        is_large = len(self._blob.digest) == _SHA256_LENGTH
        self._hash = sha256() if is_large else sha1(f"blob {self._blob.size}\0".encode(), usedforsecurity=False)

    def _take(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.size += len(chunk)

    def restart(self) -> int:
        """Forget all that came: how much it was."""
        lost = self.size
        self.path.unlink()
        self._begin()
        return lost

    def extend(self, chunks: Iterator[bytes], watch: Watch) -> None:
        with self.path.open("ab") as file:
            for chunk in chunks:
                if watch.stop.is_set():
                    raise StoppedError
                file.write(chunk)
                self._take(chunk)
                watch.on_bytes(len(chunk))
                if self.size > self._blob.size:  # another file than was promised: its hash will tell
                    return

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _go_on(blob: Blob, part: _Part, headers: Mapping[str, str], watch: Watch) -> None:
    """Fetch what is missing of the file, once."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    if part.size == blob.size:
        return
    wanted = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={part.size}-"} if part.size else {})}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", blob.url, headers=wanted, timeout=timeout) as answer:
        hf_raise_for_status(answer)
        if part.size and answer.status_code != 206:  # the whole file comes, asked for or not
            watch.on_bytes(-part.restart())
        part.extend(answer.iter_bytes(), watch)
    if part.size < blob.size:
        raise ConnectionResetError(errno.ECONNRESET, f"the answer ended after {part.size} of {blob.size} bytes")


def _may_pass(error: Exception) -> bool:
    """Whether to try again: the hub stumbled, or the connection broke. A full disk will not empty itself."""
    if (status := status_of(error)) is not None:
        return status in _PASSING
    return isinstance(error, (ConnectionError, TimeoutError, *transport_failures()))


def _rest(patience: Patience, failed: int, error: Exception, watch: Watch) -> None:
    wait_s = patience.wait_s(failed, error)
    if wait_s is None:
        raise error
    status = status_of(error)
    what = "the connection broke off" if status is None else f"the hub answered HTTP {status}"
    watch.on_note(f"{what}; trying again in {wait_s:.0f} s ({failed} of {patience.retries})")
    if watch.stop.wait(wait_s):
        raise StoppedError
