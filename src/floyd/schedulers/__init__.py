"""The components of a pipeline that say how its model was noised and how to sample from it."""

from floyd.schedulers.ddim import DDIMConfig, DDIMScheduler
from floyd.schedulers.ddpm import DDPMConfig, DDPMScheduler
from floyd.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from floyd.schedulers.multistep import DPMSolverMultistepScheduler, UniPCMultistepScheduler

__all__ = [
    "DDIMConfig",
    "DDIMScheduler",
    "DDPMConfig",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
]
