"""A class for each task: which stage's it becomes, a checkpoint or a pipeline at hand decides.

AutoPipelineForText2Image        IFPipeline, IFSuperResolutionPipeline
AutoPipelineForImage2Image       IFImg2ImgPipeline, IFImg2ImgSuperResolutionPipeline
AutoPipelineForInpainting        IFInpaintingPipeline, IFInpaintingSuperResolutionPipeline
"""

from __future__ import annotations

from typing import Any, ClassVar

from floyd.pipelines.base import DiffusionPipeline
from floyd.pipelines.deepfloyd_if import (
    IFImg2ImgPipeline,
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingPipeline,
    IFInpaintingSuperResolutionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
)
from floyd.pipelines.if_stages import IFStage, IFSuperResolutionStage
from floyd.pipelines.registry import pipeline_class

__all__ = ["AutoPipelineForImage2Image", "AutoPipelineForInpainting", "AutoPipelineForText2Image"]


class _AutoPipeline(DiffusionPipeline):
    """Never built itself: `from_pretrained` and `from_pipe` return pipelines of the stage's own class."""

    stage_one: ClassVar[type[IFStage]]
    stage_two: ClassVar[type[IFSuperResolutionStage]]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **given: Any) -> Any:
        """The task's pipeline over another one's components, which both share; nothing is loaded or copied."""
        return cls._of_stage(type(pipeline)).from_pipe(pipeline, **given)

    @classmethod
    def _class_for(cls, class_name: str) -> type[DiffusionPipeline]:
        return cls._of_stage(pipeline_class(class_name))

    @classmethod
    def _of_stage(cls, kind: type) -> type[DiffusionPipeline]:
        if issubclass(kind, IFSuperResolutionStage):
            return cls.stage_two
        if issubclass(kind, IFStage):
            return cls.stage_one
        raise ValueError(
            f"{cls.__name__} makes a {cls.stage_one.__name__} of any stage I and a {cls.stage_two.__name__} of any "
            f"stage II; a {kind.__name__} is neither."
        )


class AutoPipelineForText2Image(_AutoPipeline):
    stage_one = IFPipeline
    stage_two = IFSuperResolutionPipeline


class AutoPipelineForImage2Image(_AutoPipeline):
    stage_one = IFImg2ImgPipeline
    stage_two = IFImg2ImgSuperResolutionPipeline


class AutoPipelineForInpainting(_AutoPipeline):
    stage_one = IFInpaintingPipeline
    stage_two = IFInpaintingSuperResolutionPipeline
