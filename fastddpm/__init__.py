"""fastddpm: exact sampling of denoising diffusion models (DDPM) in PyTorch.

    from fastddpm import Sampler

    sampler = Sampler.from_pretrained("google/ddpm-cifar10-32")  # a folder or a hub id; nothing: the bundled model
    images = sampler.sample(16, seed=0, output="uint8")  # [16, 32, 32, 3]

With Hugging Face diffusers: `from fastddpm.diffusers import DDPMPipeline`, or `fastddpm.accelerate(pipe)`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm import _moved
from fastddpm._version import __version__

if TYPE_CHECKING:
    from fastddpm import ops, text
    from fastddpm.core import noise
    from fastddpm.core.schedule import Schedule
    from fastddpm.core.table import StepTable
    from fastddpm.networks.unet1d import UNet1D
    from fastddpm.networks.unet2d import UNet2D
    from fastddpm.sampling.parallel import Rounds
    from fastddpm.sampling.sampler import Sampler

_moved.install()
if (_checkout := Path(__file__).parents[1]).joinpath("kernels", "philox.py").is_file():
    __path__.append(str(_checkout))  # where fastddpm.kernels lies beside the package, not in it

__all__ = [  # and accelerate
    "Rounds",
    "Sampler",
    "Schedule",
    "StepTable",
    "UNet1D",
    "UNet2D",
    "__version__",
    "noise",
    "ops",
    "text",
]

_PLACES = {  # modules and attributes that are imported on first use: torch and diffusers take seconds
    "Rounds": "fastddpm.sampling.parallel",
    "Sampler": "fastddpm.sampling.sampler",
    "Schedule": "fastddpm.core.schedule",
    "StepTable": "fastddpm.core.table",
    "UNet1D": "fastddpm.networks.unet1d",
    "UNet2D": "fastddpm.networks.unet2d",
    "accelerate": "fastddpm.diffusers",
    "noise": "fastddpm.core.noise",
    "ops": "fastddpm.ops",
    "text": "fastddpm.text",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fastddpm' has no attribute {name!r}")
    module = import_module(_PLACES[name])
    return module if name in ("noise", "ops", "text") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
