from __future__ import annotations

from pathlib import Path

import pytest

from floyd.apps.names import CASCADES, expanded
from floyd.store.advice import IF_MODELS


def test_a_short_name_stands_for_three_stages() -> None:
    assert expanded(["if-xl"]) == [
        "DeepFloyd/IF-I-XL-v1.0",
        "DeepFloyd/IF-II-L-v1.0",
        "stabilityai/stable-diffusion-x4-upscaler",
    ]


def test_other_names_stay_and_none_is_there_twice() -> None:
    assert expanded(["org/name", "if-m", "if-m", "org/name"]) == ["org/name", *CASCADES["if-m"]]


def test_a_folder_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("if-l").mkdir()
    assert expanded(["if-l", "if-m"]) == ["if-l", *CASCADES["if-m"]]


def test_all_are_models_of_if() -> None:
    assert {model for cascade in CASCADES.values() for model in cascade} == set(IF_MODELS)
