"""Engines by name."""

from __future__ import annotations

import pytest
from tests.engines.networks import network

from floyd.engines.native import Kernels
from floyd.engines.registry import engine_names, prepared
from floyd.engines.winograd import WinogradUNet


def test_an_engine_by_its_name(compiled: Kernels) -> None:
    unet = network()
    engine = prepared("winograd", unet)
    assert isinstance(engine, WinogradUNet)
    assert engine.unet is unet


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    assert engine_names() == ["winograd", "openvino"]
    with pytest.raises(ValueError, match="engine must be one of 'winograd', 'openvino', got 'turbo'"):
        prepared("turbo", network())
