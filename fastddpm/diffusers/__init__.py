"""Hugging Face diffusers' classes, faster: change one import.

from fastddpm.diffusers import DDPMPipeline  # instead of: from diffusers import DDPMPipeline
"""

from fastddpm.diffusers.schedulers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
)

__all__ = ["DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler"]
