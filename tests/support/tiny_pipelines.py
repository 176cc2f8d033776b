"""A tiny network, our pipeline and diffusers' around it, and diffusers' images of given noise."""

import inspect

import diffusers
import pytest
import torch
from diffusers.pipelines.ddim import pipeline_ddim
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from torch import Tensor

from fastddpm import diffusers as fast
from fastddpm.diffusers.pipelines import Pipeline
from tests.support.beside_diffusers import SINGLE
from tests.support.check import TINY

KINDS = ("DDPM", "DDIM")
DRAWING_MODULES = (pipeline_ddpm, scheduling_ddpm, pipeline_ddim, scheduling_ddim)
OPTIONS = {**TINY, "sample_size": 8}
STEPS = 4
# whether "pt" gives tensors in this version of diffusers
SUPPORTS_PT = "output_type != " in inspect.getsource(diffusers.DDPMPipeline.__call__)


def tiny_unet(package=fast, dtype=SINGLE, **options):
    """A network in evaluation mode, with the same weights in either package."""
    torch.manual_seed(0)
    return package.UNet2DModel(**{**OPTIONS, **options}).to(dtype).eval()


def network_pair(dtype=SINGLE, **options):
    """Our network and diffusers'."""
    return tiny_unet(fast, dtype, **options), tiny_unet(diffusers, dtype, **options)


def fused_output(unet, *args, **kwargs):
    """What a network of ours returns in `sampling`."""
    with torch.no_grad(), unet.sampling():
        return unet(*args, **kwargs).sample


def plain_output(unet, *args, **kwargs):
    """What a network returns outside of `sampling`."""
    with torch.no_grad():
        return unet(*args, **kwargs).sample


def pipeline(package=fast, kind="DDPM", dtype=SINGLE, scheduler=None, **options):
    """A pipeline without a progress bar around a tiny network; scheduler: the options of its scheduler."""
    part = getattr(package, f"{kind}Scheduler")(**(scheduler or {}))
    return without_progress(getattr(package, f"{kind}Pipeline")(tiny_unet(package, dtype, **options), part))


def pipeline_pair(*args, **kwargs):
    """Our pipeline and diffusers'."""
    return pipeline(fast, *args, **kwargs), pipeline(diffusers, *args, **kwargs)


def without_progress(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hooked(*pipes):
    """The same pipelines; their networks get a hook, so that diffusers' own forward has to run."""
    for pipe in pipes:
        pipe.unet.register_forward_hook(lambda *args: None)
    return pipes


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def take_all(draws):
    """Empty a list; returns what was in it."""
    taken = list(draws)
    draws.clear()
    return taken


def sample(pipe, n=2, **call):
    """Images as a tensor, by default of the same seed in each call."""
    call = {"generator": seeded(), "num_inference_steps": STEPS, "output_type": "pt", **call}
    supported = SUPPORTS_PT or isinstance(pipe, Pipeline) or call["output_type"] != "pt"
    if not supported and pipe.unet.dtype == torch.bfloat16:
        pytest.skip("this version of diffusers makes no images in bfloat16")
    images = pipe(n, **call).images
    if not supported and not isinstance(images, Tensor):
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return images


def images_of_noise(monkeypatch, draws, pipe, dtype=SINGLE, n=2, **call) -> Tensor:
    """diffusers' images of given noise.

    Args:
        draws: x_T and the noise of each step.
        pipe: a pipeline of diffusers; its network is converted to dtype.
        dtype: in which it computes.
    """
    remaining = iter(draws)
    pipe.unet.to(dtype)
    with monkeypatch.context() as patch:
        for module in DRAWING_MODULES:
            patch.setattr(module, "randn_tensor", lambda *args, dtype, **kwargs: next(remaining).to(dtype))
        images = sample(pipe, n, **call)
    assert not list(remaining), "diffusers' loop drew less noise than given"
    return images
