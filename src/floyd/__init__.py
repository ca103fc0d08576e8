"""DeepFloyd IF from first principles: text to 64, 256 and 1024 pixels.

A public name is loaded when it is first asked for: `import floyd` alone imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from floyd.store.imports import without_collecting

if TYPE_CHECKING:  # what `_HOMES` says, for editors and type checkers
    from floyd.models.safety import IFSafetyChecker
    from floyd.models.unet import UNet2DConditionModel
    from floyd.models.vae import AutoencoderKL
    from floyd.models.watermark import IFWatermarker
    from floyd.pipelines.auto import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
    from floyd.pipelines.base import DiffusionPipeline
    from floyd.pipelines.cascade import Cascade
    from floyd.pipelines.deepfloyd_if import (
        IFImg2ImgPipeline,
        IFImg2ImgSuperResolutionPipeline,
        IFInpaintingPipeline,
        IFInpaintingSuperResolutionPipeline,
        IFPipeline,
        IFSuperResolutionPipeline,
    )
    from floyd.pipelines.sizing import Workload
    from floyd.pipelines.upscale import StableDiffusionUpscalePipeline
    from floyd.runtime.budget import Budget
    from floyd.runtime.profile import Profile
    from floyd.schedulers.ddim import DDIMScheduler
    from floyd.schedulers.ddpm import DDPMScheduler
    from floyd.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
    from floyd.schedulers.multistep import DPMSolverMultistepScheduler, UniPCMultistepScheduler
    from floyd.store.text_encoders import load_text_encoder, load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "AutoencoderKL",
    "Budget",
    "Cascade",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DiffusionPipeline",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IFImg2ImgPipeline",
    "IFImg2ImgSuperResolutionPipeline",
    "IFInpaintingPipeline",
    "IFInpaintingSuperResolutionPipeline",
    "IFPipeline",
    "IFSafetyChecker",
    "IFSuperResolutionPipeline",
    "IFWatermarker",
    "Profile",
    "StableDiffusionUpscalePipeline",
    "UNet2DConditionModel",
    "UniPCMultistepScheduler",
    "Workload",
    "__version__",
    "load_text_encoder",
    "load_tokenizer",
]

_HOMES = {
    "AutoPipelineForImage2Image": "floyd.pipelines.auto",
    "AutoPipelineForInpainting": "floyd.pipelines.auto",
    "AutoPipelineForText2Image": "floyd.pipelines.auto",
    "AutoencoderKL": "floyd.models.vae",
    "Budget": "floyd.runtime.budget",
    "Cascade": "floyd.pipelines.cascade",
    "DDIMScheduler": "floyd.schedulers.ddim",
    "DDPMScheduler": "floyd.schedulers.ddpm",
    "DPMSolverMultistepScheduler": "floyd.schedulers.multistep",
    "DiffusionPipeline": "floyd.pipelines.base",
    "EulerAncestralDiscreteScheduler": "floyd.schedulers.euler",
    "EulerDiscreteScheduler": "floyd.schedulers.euler",
    "HeunDiscreteScheduler": "floyd.schedulers.euler",
    "IFImg2ImgPipeline": "floyd.pipelines.deepfloyd_if",
    "IFImg2ImgSuperResolutionPipeline": "floyd.pipelines.deepfloyd_if",
    "IFInpaintingPipeline": "floyd.pipelines.deepfloyd_if",
    "IFInpaintingSuperResolutionPipeline": "floyd.pipelines.deepfloyd_if",
    "IFPipeline": "floyd.pipelines.deepfloyd_if",
    "IFSafetyChecker": "floyd.models.safety",
    "IFSuperResolutionPipeline": "floyd.pipelines.deepfloyd_if",
    "IFWatermarker": "floyd.models.watermark",
    "Profile": "floyd.runtime.profile",
    "StableDiffusionUpscalePipeline": "floyd.pipelines.upscale",
    "UNet2DConditionModel": "floyd.models.unet",
    "UniPCMultistepScheduler": "floyd.schedulers.multistep",
    "Workload": "floyd.pipelines.sizing",
    "load_text_encoder": "floyd.store.text_encoders",
    "load_tokenizer": "floyd.store.text_encoders",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with without_collecting():
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
