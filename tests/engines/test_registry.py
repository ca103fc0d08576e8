"""Engines by name."""

from __future__ import annotations

from functools import cache
from typing import NoReturn

import pytest
from tests.engines.networks import autoencoder, network
from torch import nn

from floyd.engines import native, registry
from floyd.engines.decoder import WinogradDecoder
from floyd.engines.native import Kernels
from floyd.engines.registry import decoder_for, engine_for, engine_names, prepared
from floyd.engines.winograd import WinogradUNet
from floyd.errors import EngineError


def test_an_engine_by_its_name(compiled: Kernels) -> None:
    unet = network()
    engine = prepared("winograd", unet)
    assert isinstance(engine, WinogradUNet)
    assert engine.unet is unet


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    assert engine_names() == ["winograd", "openvino"]
    with pytest.raises(ValueError, match="engine must be one of 'auto', 'winograd', 'openvino', got 'turbo'"):
        engine_for("turbo", network())


def test_auto_takes_no_options() -> None:
    with pytest.raises(ValueError, match="'auto' takes no options, got precision: name the engine"):
        engine_for("auto", network(), precision="bf16")


def test_an_engine_is_made_once_for_a_network(compiled: Kernels) -> None:
    unet = network()
    made = engine_for("winograd", unet)
    assert engine_for("winograd", unet, made) is made
    assert engine_for("auto", unet, made) is made
    other = engine_for("winograd", network(), made)
    assert other is not None
    assert other is not made


def test_auto_is_the_fastest_that_computes_the_same(compiled: Kernels) -> None:
    assert isinstance(engine_for("auto", network()), WinogradUNet)
    assert isinstance(decoder_for("auto", autoencoder(16)), WinogradDecoder)


def test_auto_is_no_engine_while_the_network_is_not_plain(compiled: Kernels) -> None:
    for name, network_, make in (("unet", network(), engine_for), ("vae", autoencoder(16), decoder_for)):
        made = make("auto", network_)
        handle = next(network_.children()).register_forward_hook(lambda *_: None)
        assert make("auto", network_, made) is None, name
        handle.remove()
        assert make("auto", network_, made) is made, name
        assert make("auto", network_.bfloat16(), made) is None, name


def test_auto_is_no_engine_for_what_is_no_network_of_ours() -> None:
    assert engine_for("auto", nn.Linear(3, 3)) is None


def test_auto_is_no_engine_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is found out once."""
    asked = []

    def refuse() -> NoReturn:
        asked.append("kernels")
        raise EngineError("no compiler")

    monkeypatch.setattr(native, "kernels", refuse)
    monkeypatch.setattr(native, "are_here", cache(native.are_here.__wrapped__))
    for _ in range(2):
        assert engine_for("auto", network()) is None
        assert decoder_for("auto", autoencoder(16)) is None
    assert asked == ["kernels"]


@pytest.mark.parametrize(("share", "is_enough"), [(1.01, True), (0.99, False)])
def test_auto_packs_weights_only_where_half_of_memory_stays_free(
    compiled: Kernels, monkeypatch: pytest.MonkeyPatch, share: float, is_enough: bool
) -> None:
    unet = network()
    packed = 4 * sum(weight.nbytes for weight in unet.parameters())
    monkeypatch.setattr(registry, "free_ram", lambda: int(2 * packed * share))
    assert (engine_for("auto", unet) is not None) == is_enough
    monkeypatch.setattr(registry, "free_ram", lambda: None)  # a system that does not tell
    assert engine_for("auto", unet) is not None
