"""The components of a pipeline that say how its model was noised and how to sample from it."""

from floyd.schedulers.ddim import DDIMConfig, DDIMScheduler
from floyd.schedulers.ddpm import DDPMConfig, DDPMScheduler

__all__ = ["DDIMConfig", "DDIMScheduler", "DDPMConfig", "DDPMScheduler"]
