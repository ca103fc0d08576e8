"""What every test stands on: no network, one thread per worker, chance from a seed."""

from __future__ import annotations

import os
import signal

# Before anything imports the hub's client, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a shell: Ctrl-C must still count
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator at seed 0, new for each test."""
    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked `gpu` that was asked for on a machine without one is skipped, and says why."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
