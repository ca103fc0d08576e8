"""The compiled kernels, or a reason why there are none on this machine."""

from __future__ import annotations

import pytest

from floyd.engines.native import Kernels, kernels
from floyd.errors import EngineError


@pytest.fixture(scope="session")
def compiled() -> Kernels:
    try:
        return kernels()
    except EngineError as error:
        pytest.skip(f"no kernels here: {error}")
