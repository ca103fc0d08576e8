from __future__ import annotations

from dataclasses import fields

import pytest

from floyd.nn.rewrites import Rewrites
from floyd.runtime.switches import Switches


def test_every_rewrite_of_a_layer_has_its_switch() -> None:
    wanted = {name for name, value in vars(Rewrites).items() if isinstance(value, property)}
    assert wanted <= {field.name for field in fields(Switches)}


def test_all_are_off_until_they_are_named() -> None:
    assert Switches() == Switches.off()
    assert not any(getattr(Switches(), field.name) for field in fields(Switches))
    assert [field.name for field in fields(Switches) if not getattr(Switches.on(), field.name)] == ["compiled"]


def test_what_is_best_depends_on_the_device() -> None:
    assert Switches.best_for("cpu").pack_convolutions
    assert not Switches.best_for("cuda").pack_convolutions
    assert Switches.best_for("cuda").time_table


def test_a_switch_is_on_or_off() -> None:
    with pytest.raises(TypeError, match="fuse_qkv"):
        Switches(fuse_qkv=1)  # type: ignore[arg-type]


def test_copies_of_weights_need_somebody_who_keeps_them() -> None:
    with pytest.raises(ValueError, match="read_once"):
        Switches(fuse_qkv=True)
