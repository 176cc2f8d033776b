"""Faster DDPM and DDIM classes of Hugging Face diffusers: change one import.

from fastddpm.diffusers import DDPMPipeline  # instead of: from diffusers import DDPMPipeline

Or keep the imports and call fastddpm.accelerate(pipe).
"""

import re

try:
    import diffusers

    if tuple(map(int, re.findall(r"\d+", diffusers.__version__)[:2])) < (0, 35):
        raise ImportError(f"diffusers is {diffusers.__version__}")
except ImportError as error:
    wanted = "fastddpm.diffusers needs diffusers 0.35 or newer: pip install 'fastddpm[diffusers]'"
    raise ImportError(f"{wanted} ({error})") from error

from fastddpm.diffusers.accelerating import Accelerated, accelerate
from fastddpm.diffusers.decoding import decode
from fastddpm.diffusers.pipelines import DDIMPipeline, DDPMPipeline
from fastddpm.diffusers.schedulers import DDIMParallelScheduler, DDIMScheduler, DDPMParallelScheduler, DDPMScheduler
from fastddpm.diffusers.unet import UNet2DModel

__all__ = [
    "Accelerated",
    "DDIMParallelScheduler",
    "DDIMPipeline",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMPipeline",
    "DDPMScheduler",
    "UNet2DModel",
    "accelerate",
    "decode",
]
