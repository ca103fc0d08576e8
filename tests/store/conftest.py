"""A small network with everything the store must carry, a hub cache in the real layout, and a hub on localhost."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from torch import nn

from floyd.store.config import Config
from floyd.store.pretrained import Model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    width: int = 4
    depths: tuple[int, ...] = (1, 2)


class Toy(Model):
    """Weights, a stored buffer of bytes, and a buffer that is computed and not stored."""

    config_class = ToyConfig
    config: ToyConfig
    mark: torch.Tensor
    ramp: torch.Tensor

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.layer = nn.Linear(self.config.width, 3)
        self.scale = nn.Parameter(torch.ones(self.config.width))
        self.register_buffer("mark", torch.zeros(2, 2))
        self.register_buffer("ramp", torch.arange(4.0), persistent=False)


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    model = Toy(width=5)
    model.mark.fill_(7)
    return model


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    """Equal weights under equal names."""
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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


@dataclass
class Hub:
    """Repositories by id, what was fetched from them, and how the hub is to fail: (status, X-Error-Code)."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    failure: tuple[int, str] | None = None
    only_files_fail: bool = False
    fetched: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def answer(self, path: str, method: str) -> tuple[int, dict[str, str], bytes]:
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = parts[2:]
        if self.failure and not (is_api and self.only_files_fail):
            status, code = self.failure
            return status, {"X-Error-Code": code} if code else {}, b""
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        files = self.repositories.get(repo_id)
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if len(rest) > 1 and rest[1] not in {"main", COMMIT}:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        return self._listing(repo_id, files, rest) if is_api else self._file(files, rest, method)

    def _listing(self, repo_id: str, files: dict[str, bytes], rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        content: Any = {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        if rest and rest[0] == "tree":
            content = [{"type": "file", "path": n, "size": len(b), "oid": f"{hash(n):x}"} for n, b in files.items()]
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def _file(self, files: dict[str, bytes], rest: list[str], method: str) -> tuple[int, dict[str, str], bytes]:
        name = "/".join(rest[2:])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if method == "GET":
            self.fetched.append(name)
        return 200, {"ETag": f'"{abs(hash(name)):040x}"', "X-Repo-Commit": COMMIT}, files[name]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on localhost, asked by the real client."""
    import huggingface_hub
    from huggingface_hub import constants

    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.tokens.append(self.headers.get("Authorization", ""))
            status, headers, body = state.answer(self.path, self.command)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            """Silence: the test says what went wrong."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield state
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()
