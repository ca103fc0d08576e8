from __future__ import annotations

from typing import Any

import pytest

from floyd.pipelines.order import merged, seeds_of


def test_a_number_of_steps_is_stronger_than_a_stored_table() -> None:
    preset = {"timesteps": "fast27", "guidance_scale": 5.0}
    assert merged(preset, {"num_inference_steps": 9}) == {"num_inference_steps": 9, "guidance_scale": 5.0}
    assert merged(preset, {"guidance_scale": 2.0}) == {"timesteps": "fast27", "guidance_scale": 2.0}


def test_a_table_of_the_callers_is_stronger_than_a_stored_number() -> None:
    assert merged({"num_inference_steps": 9}, {"timesteps": "fast27"})["timesteps"] == "fast27"


def test_image_i_has_the_seed_of_the_call_and_i() -> None:
    assert seeds_of(7, 3) == (7, 8, 9)


@pytest.mark.parametrize(
    ("seed", "count", "message"),
    [(-1, 1, "seed"), (True, 1, "seed"), (1.0, 1, "seed"), ("1", 1, "seed"), (0, 0, "count"), (0, True, "count")],
)
def test_a_seed_is_an_int_and_a_count_a_positive_one(seed: Any, count: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        seeds_of(seed, count)
