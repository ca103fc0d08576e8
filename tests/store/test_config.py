from __future__ import annotations

import dataclasses
import json

import pytest
from tests.store.conftest import ToyConfig


def test_foreign_keys_survive_a_load_and_a_save() -> None:
    given = {"width": 8, "depths": [3, 4], "_class_name": "Old", "lambda_min_clipped": -5.1, "nested": {"a": [1, 2]}}
    config = ToyConfig.from_json(given)
    assert config.width == 8
    assert config.depths == (3, 4)
    assert config.lambda_min_clipped == -5.1
    assert json.loads(json.dumps(config.to_json())) == given


def test_it_is_a_mapping_of_known_and_foreign_keys() -> None:
    config = ToyConfig.from_json({"extra": 1}, width=9)
    assert dict(config) == {"extra": 1, "width": 9, "depths": (1, 2)}
    assert config["extra"] == 1
    assert len(config) == 3
    with pytest.raises(AttributeError, match="no key 'absent'"):
        _ = config.absent
    with pytest.raises(KeyError):
        config["absent"]


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ToyConfig().width = 3  # type: ignore[misc]
