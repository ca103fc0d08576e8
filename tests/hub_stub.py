"""A hub on localhost that the real client talks to, with every way to fail, and the cache that the client leaves."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")  # kept apart, under SHA-256
LISTING = "listing"  # as the name of a fault


def fill_cache(cache: Path, repo_id: str, files: dict[str, bytes]) -> Path:
    """What the hub's client leaves behind: blobs, links to them under the commit, and the branch's name."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for number, (name, content) in enumerate(files.items()):
        blob = root / "blobs" / f"{number:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def digest(name: str, content: bytes) -> str:
    """Under which name the hub keeps a content: git's hash of small files, SHA-256 of large ones."""
    if name.endswith(LARGE):
        return sha256(content).hexdigest()
    return sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class Fault:
    """What one answer is to be instead: a status, or a body that ends early, whether or not its length was promised."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    promise: bool = True
    content: bytes | None = None  # another one, of the same length


@dataclass
class Hub:
    """Repositories by id, what was fetched from them, and how the hub is to fail: (status, X-Error-Code)."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    failure: tuple[int, str] | None = None
    failure_headers: dict[str, str] = field(default_factory=dict)
    only_files_fail: bool = False
    faults: dict[str, list[Fault]] = field(default_factory=dict)  # by file name, each for one GET
    lists_sizes: bool = True
    knows_ranges: bool = True
    uses_cdn: bool = False  # large files come from another server
    fetched: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)  # of what was asked for with one
    tokens: list[str] = field(default_factory=list)
    cdn_tokens: list[str] = field(default_factory=list)
    cdn: str = ""

    def answer(self, path: str, method: str, asked_range: str, *, is_cdn: bool = False) -> Answer:
        url = urlsplit(path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = parts[2:]
        if self.failure and not (is_api and self.only_files_fail):
            status, code = self.failure
            return Answer(status, {**self.failure_headers, **({"X-Error-Code": code} if code else {})})
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        files = self.repositories.get(repo_id)
        if files is None:
            return Answer(404, {"X-Error-Code": "RepoNotFound"})
        if len(rest) > 1 and rest[1] not in {"main", COMMIT}:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        if is_api:
            return self._listing(repo_id, files, rest, is_full="blobs" in parse_qs(url.query))
        return self._file(files, "/".join(rest[2:]), method, asked_range, "" if is_cdn else self.cdn + url.path)

    def _listing(self, repo_id: str, files: dict[str, bytes], rest: list[str], *, is_full: bool) -> Answer:
        if fault := self._fault(LISTING):
            return Answer(fault.status or 500, fault.headers)
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in files]
        if is_full and self.lists_sizes:
            siblings = [_described(name, content) for name, content in files.items()]
        listing: Any = {"id": repo_id, "sha": COMMIT, "siblings": siblings}
        if rest and rest[0] == "tree":
            listing = [{"type": "file", "path": n, "size": len(b), "oid": digest(n, b)} for n, b in files.items()]
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _file(self, files: dict[str, bytes], name: str, method: str, asked_range: str, cdn: str) -> Answer:
        if name not in files:
            return Answer(404, {"X-Error-Code": "EntryNotFound"})
        content = files[name]
        etag = {"ETag": f'"{digest(name, content)}"', "X-Repo-Commit": COMMIT}
        if self.uses_cdn and cdn and name.endswith(LARGE):
            moved = {
                "X-Linked-Etag": etag["ETag"],
                "X-Linked-Size": str(len(content)),
                "Location": cdn,
            }
            return Answer(302, {**etag, **moved})
        fault = None
        if method == "GET":
            self.fetched.append(name)
            if asked_range:
                self.ranges.append(asked_range)
            fault = self._fault(name)
        if fault and fault.status is not None:
            return Answer(fault.status, fault.headers)
        content = content if fault is None or fault.content is None else fault.content
        status, start = 200, 0
        if asked_range and self.knows_ranges:
            status, start = 206, int(asked_range.removeprefix("bytes=").split("-")[0])
            etag["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = None if fault is None or fault.cut_at is None else max(fault.cut_at - start, 0)
        return Answer(status, etag, content[start:], cut, fault is None or fault.promise)

    def _fault(self, name: str) -> Fault | None:
        waiting = self.faults.get(name)
        return waiting.pop(0) if waiting else None


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    promise: bool = True


def _described(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": digest("", content)}
    if name.endswith(LARGE):
        entry["lfs"] = {"sha256": digest(name, content), "size": len(content), "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    is_cdn = False

    def do_GET(self) -> None:
        (self.hub.cdn_tokens if self.is_cdn else self.hub.tokens).append(self.headers.get("Authorization", ""))
        answer = self.hub.answer(self.path, self.command, self.headers.get("Range", ""), is_cdn=self.is_cdn)
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if answer.promise:
            self.send_header("Content-Length", str(len(answer.body)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(answer.body[: answer.cut])
        if answer.cut is not None or not answer.promise:
            self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        """Silence: the test says what went wrong."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests; any other fault is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub, asked by the real client, whose cache is this folder."""
    import huggingface_hub
    from huggingface_hub import constants

    hub = Hub()
    with _served(hub) as endpoint, _served(hub, is_cdn=True) as hub.cdn:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache.parent / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        try:
            yield hub
        finally:
            huggingface_hub.close_session()


@contextmanager
def _served(hub: Hub, *, is_cdn: bool = False) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"hub": hub, "is_cdn": is_cdn})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
