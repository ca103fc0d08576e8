"""The pipeline classes by the names that checkpoints know them by."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from floyd.pipelines.base import DiffusionPipeline

# Where the classes live that a checkpoint may name; classes of one's own are found once they are defined.
_HOMES = {
    "IFPipeline": "floyd.pipelines.deepfloyd_if",
    "IFSuperResolutionPipeline": "floyd.pipelines.deepfloyd_if",
    "IFImg2ImgPipeline": "floyd.pipelines.deepfloyd_if",
    "IFImg2ImgSuperResolutionPipeline": "floyd.pipelines.deepfloyd_if",
    "IFInpaintingPipeline": "floyd.pipelines.deepfloyd_if",
    "IFInpaintingSuperResolutionPipeline": "floyd.pipelines.deepfloyd_if",
    "StableDiffusionUpscalePipeline": "floyd.pipelines.upscale",
}
_DEFINED: dict[str, type[DiffusionPipeline]] = {}


def define(cls: type[DiffusionPipeline]) -> None:
    """From now on a checkpoint may name it."""
    _DEFINED[cls.__name__] = cls


def pipeline_class(class_name: str) -> type[DiffusionPipeline]:
    """The class that a checkpoint's index names."""
    if class_name not in _DEFINED and class_name in _HOMES:
        import_module(_HOMES[class_name])
    if class_name not in _DEFINED:
        raise ValueError(
            f"The checkpoint describes a {class_name}, which floyd does not have; it has {', '.join(sorted(_HOMES))}. "
            "Call from_pretrained on the class that you want."
        )
    return _DEFINED[class_name]
