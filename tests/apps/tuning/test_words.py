"""A learned word in a cascade, whose text encoder may come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from floyd.adapters.tokens import write_rows
from floyd.pipelines.cascade import Cascade


def test_a_text_encoder_that_was_freed_comes_back_with_the_word(folder: Path, tmp_path: Path) -> None:
    write_rows({"zorp": torch.linspace(-3, 3, tiny.ENCODER_WIDTH)}, tmp_path)
    told: dict[str, Any] = {"size": 48, "steps": 1, "seed": 4}

    def painted(cascade: Cascade, **options: Any) -> np.ndarray:
        return np.asarray(cascade("a zorp", **told, **options).images[0])

    cascade = Cascade.from_pretrained(folder)
    unread = painted(cascade)
    stage: Any = cascade.stages["stage_1"]
    assert stage.load_textual_inversion(tmp_path) == ["zorp"]
    first = painted(cascade, free_text_encoder=True)
    assert stage.text_encoder is None
    assert np.array_equal(painted(cascade), first)
    assert not np.array_equal(unread, first)


def test_a_pipeline_without_its_text_encoder_says_so(folder: Path) -> None:
    from floyd.pipelines.deepfloyd_if import IFPipeline

    pipe = IFPipeline.from_pretrained(folder / "stage_1", text_encoder=None, requires_safety_checker=False)
    with pytest.raises(ValueError, match="without its text_encoder"):
        pipe.load_textual_inversion({"zorp": torch.zeros(tiny.ENCODER_WIDTH)})
