"""Outputs are read as the incumbent's are."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.deepfloyd_if import IFPipelineOutput as TheirOutput

from floyd.pipelines.output import IFPipelineOutput, StableDiffusionPipelineOutput

PICTURE = torch.zeros(1, 3, 2, 2)


@pytest.mark.parametrize("flags", [(None, None), ([True], [False])])
def test_an_output_answers_as_the_incumbents_does(flags: tuple[list[bool] | None, list[bool] | None]) -> None:
    ours, theirs = IFPipelineOutput(PICTURE, *flags), TheirOutput(PICTURE, *flags)
    assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)
    assert ours.to_tuple() == theirs.to_tuple()
    assert ours[0] is theirs[0] is ours["images"] is ours.images
    assert ours[1:] == theirs[1:]
    assert dict(ours.items()) == dict(theirs.items())
    assert ("nsfw_detected" in ours) == ("nsfw_detected" in theirs)


def test_what_is_absent_cannot_be_indexed() -> None:
    output = StableDiffusionPipelineOutput(PICTURE)
    assert output.nsfw_content_detected is None
    with pytest.raises(KeyError):
        output["nsfw_content_detected"]
    with pytest.raises(IndexError):
        output[1]


def test_what_the_incumbent_does_not_tell_has_a_name_but_no_place() -> None:
    plain = IFPipelineOutput(PICTURE, [True], [False])
    told = IFPipelineOutput(PICTURE, [True], [False], nsfw_scores=[3.0], watermark_scores=[-1.0])
    assert told.nsfw_scores == [3.0]
    assert told.watermark_scores == [-1.0]
    assert list(told) == list(plain) == ["images", "nsfw_detected", "watermark_detected"]
    assert told.to_tuple() == plain.to_tuple()
    third = StableDiffusionPipelineOutput(PICTURE, [True], watermark_detected=[False], nsfw_scores=[3.0])
    assert third.watermark_detected == [False]
    assert list(third) == ["images", "nsfw_content_detected"]
