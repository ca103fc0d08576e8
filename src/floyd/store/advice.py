"""What to do when the hub does not deliver: its client's many errors, each in one sentence with a way out."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, TypeVar

from floyd.errors import CheckpointError, DownloadError
from floyd.store.source import Source

IF_MODELS = (
    "DeepFloyd/IF-I-M-v1.0",
    "DeepFloyd/IF-I-L-v1.0",
    "DeepFloyd/IF-I-XL-v1.0",
    "DeepFloyd/IF-II-M-v1.0",
    "DeepFloyd/IF-II-L-v1.0",
    "stabilityai/stable-diffusion-x4-upscaler",
)
GO_ONLINE = "Load it once with a network (without local_files_only and HF_HUB_OFFLINE), or give a local folder."
LOG_IN = "run `hf auth login`, set HF_TOKEN or pass token=..."
TOKENS = "https://huggingface.co/settings/tokens"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NETWORK = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "HF_ENDPOINT", "SSL_CERT_FILE")
_RESET = re.compile(r"\br=0\b.*\bt=(\d+)")  # the hub's own header: `"api";r=0;t=55`

_T = TypeVar("_T")


def asked(source: Source, ask: Callable[[], _T]) -> _T:
    """What the hub's client answers, or a DownloadError that says what to do."""
    try:
        return ask()
    except failures() as error:
        raise translated(source, error) from error


def failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises when it cannot deliver."""
    from huggingface_hub.errors import EntryNotFoundError

    return (OSError, EntryNotFoundError, *transport_failures())


def transport_failures() -> tuple[type[Exception], ...]:
    """What its HTTP library raises. That changed its name, hence the search."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def status_of(error: BaseException) -> int | None:
    """The number that the hub answered with, if it did answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def wait_asked_for(error: BaseException) -> float | None:
    """How many seconds the hub wants to be left alone."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    if match := _RESET.search(headers.get("ratelimit", "")):
        return float(match[1])
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return None


def absent(source: Source, what: str, *, or_else: str = "") -> CheckpointError:
    if not source.is_offline:
        return CheckpointError(f"{source.id}: {what}.{or_else}")
    return DownloadError(f"{source.id}: {what}, and floyd is offline. {GO_ONLINE}{or_else}")


def translated(source: Source, error: Exception) -> DownloadError:
    """Say what to do about a failure of the hub's client."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # not in the cache either; why the cache had to do is what matters
    if isinstance(error, errors.LocalTokenNotFoundError):
        advice = "was asked for with token=True, but no token is stored: run `hf auth login` or pass the token."
    elif status_of(error) is not None:
        advice = _answered(source, error)
    elif isinstance(error, OSError) and error.errno in _FULL:
        advice = f"does not fit on the disk: no space is left in {source.cache_root}. {_OTHER_DISK}"
    elif isinstance(error, OSError) and error.errno in _CLOSED:
        advice = f"cannot be stored in {source.cache_root} ({error.strerror}). {_OTHER_DISK}"
    elif source.is_offline:
        advice = f"is not in the cache ({source.cache_root}), and floyd is offline. {GO_ONLINE}"
    else:
        advice = f"could not be fetched ({_told(error)}): check the network, or give a local folder.{_network()}"
    return DownloadError(f"{source.id} {advice}")


_OTHER_DISK = "Make room there, or choose another place with cache_dir=..., --cache-dir or HF_HOME."


def _answered(source: Source, error: Exception) -> str:
    """The hub said no, and said why."""
    from huggingface_hub import constants, errors

    page, status, has_token = f"{constants.ENDPOINT}/{source.id}", status_of(error), _has_token(source)
    if isinstance(error, errors.GatedRepoError):
        return _gated(page, has_token) + _its_words(error)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {source.revision!r}: see {page}/refs."
    if status == 401 and has_token and not _is_called_absent(error):
        return (
            "could not be asked for: the hub does not accept the token (HTTP 401). It is mistyped, expired or revoked: "
            f"make one at {TOKENS}, then {LOG_IN}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        meant = get_close_matches(source.id.lower(), [known.lower() for known in IF_MODELS], n=1, cutoff=0.8)
        guess = next((f" Did you mean {known}?" for known in IF_MODELS if known.lower() in meant), "")
        return f"was not found, or is private: check the name at {page}, and if it is private, {LOG_IN}.{guess}"
    if status in {401, 403}:
        return f"is not open to you (HTTP {status}): pass a valid token, {LOG_IN}, and see {page}.{_its_words(error)}"
    if status == 429:
        wait = wait_asked_for(error)
        when = "in some minutes" if wait is None else f"in {wait:.0f} s"
        more = "" if has_token else f" Who is logged in may ask more often: {LOG_IN}."
        return f"was asked for too often (HTTP 429): try again {when}; files that came are kept.{more}"
    return f"could not be fetched, the hub answered HTTP {status}: try again later, or give a local folder."


def _gated(page: str, has_token: bool) -> str:
    if not has_token:
        return (
            f"is gated: log in to {page} and accept the licence there, then {LOG_IN}, with a token from {TOKENS}. "
            "A fine-grained token needs the permission to read gated repositories."
        )
    return (
        f"is gated, and your token does not open it: log in to {page} with the token's account and accept the licence "
        "there. A fine-grained token needs the permission to read gated repositories, an expired one must be renewed "
        f"({TOKENS})."
    )


def _is_called_absent(error: Exception) -> bool:
    """The hub answers 401 both for a bad token and for what is absent; only the latter bears this code."""
    return getattr(error, "response", None) is not None and error.response.headers.get("X-Error-Code") is not None  # type: ignore[attr-defined]


def _has_token(source: Source) -> bool:
    """Whether one was sent. Nobody looks at it here."""
    from huggingface_hub.utils import build_hf_headers

    return "authorization" in build_hf_headers(token=source.token)


def _its_words(error: Exception) -> str:
    words = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f" The hub says: {words[:200]}" if words else ""


def _told(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


def _network() -> str:
    """What bends the way to the hub. Names only: a proxy's address may hold a password."""
    set_here = [name for name in _NETWORK if os.environ.get(name) or os.environ.get(name.lower())]
    return f" Set on this machine: {', '.join(set_here)}." if set_here else ""
