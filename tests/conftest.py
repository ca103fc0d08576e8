"""What every test stands on: no network, one thread per worker, chance from a seed."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any, NoReturn

# Before anything imports the hub's client, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Before torch loads OpenMP: threads that wait for one another sleep, for the workers have taken all cores.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a shell: Ctrl-C must still count
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator at seed 0, new for each test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for an address or a connection is refused."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError("a test without a network asked for one")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


@pytest.fixture(scope="session")
def compiled() -> Any:
    """The engine's kernels. Only a machine without a compiler has none: where they do not compile, tests fail."""
    from floyd.engines import native
    from floyd.errors import EngineError

    try:
        native.found_compiler()
    except EngineError as error:
        pytest.skip(str(error))
    return native.kernels()


@pytest.fixture(scope="session")
def tiny_hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every checkpoint of the docs under its own id, tiny; see `tests/hub_cache.py`."""
    from tests import hub_cache

    return hub_cache.build(tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def published(tiny_hub_cache: Path, no_network: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published checkpoints, in the hub's cache of a machine without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tiny_hub_cache))
    return tiny_hub_cache


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked `gpu` that was asked for on a machine without one is skipped, and says why."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--switches", default=None, help='of runtime/switches.py, for tests/pipelines: "off", "on", a name'
    )
