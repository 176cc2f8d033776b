"""A tiny network, a pipeline of ours and one of diffusers around it, and diffusers' images of given noise."""

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
from tests.support.check import TINY

KINDS = ("DDPM", "DDIM")
DRAWING = (pipeline_ddpm, scheduling_ddpm, pipeline_ddim, scheduling_ddim)
LOW = (torch.bfloat16, torch.float16)
SINGLE, DOUBLE = torch.float32, torch.float64
OPTIONS = {**TINY, "sample_size": 8}
STEPS = 4
TENSORS = "output_type != " in inspect.getsource(diffusers.DDPMPipeline.__call__)  # are what "pt" returns there


def tiny_unet(package=fast, dtype=SINGLE, **options):
    """A network, in evaluation mode, that has the same weights in either package."""
    torch.manual_seed(0)
    return package.UNet2DModel(**{**OPTIONS, **options}).to(dtype).eval()


def calls(unet, *args, **kwargs):
    """What a network returns in `sampling`."""
    with torch.no_grad(), unet.sampling():
        return unet(*args, **kwargs).sample


def plain_calls(unet, *args, **kwargs):
    with torch.no_grad():
        return unet(*args, **kwargs).sample


def both_networks(dtype=SINGLE, **options):
    return tiny_unet(fast, dtype, **options), tiny_unet(diffusers, dtype, **options)


def pipeline(package=fast, kind="DDPM", dtype=SINGLE, scheduler=None, **options):
    """A silent pipeline around such a network; scheduler: the options of its scheduler."""
    part = getattr(package, f"{kind}Scheduler")(**(scheduler or {}))
    pipe = getattr(package, f"{kind}Pipeline")(tiny_unet(package, dtype, **options), part)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(*args, **kwargs):
    """Ours and diffusers'."""
    return pipeline(fast, *args, **kwargs), pipeline(diffusers, *args, **kwargs)


def hooked(*pipes):
    """The same pipelines, whose networks have a hook, so that their own forward has to be called."""
    for pipe in pipes:
        pipe.unet.register_forward_hook(lambda *args: None)
    return pipes


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def taken(draws):
    """What was drawn, which is then forgotten."""
    found = list(draws)
    draws.clear()
    return found


def sample(pipe, n=2, **call):
    """Images as a tensor, by default of the same generator in each call."""
    call = {"generator": seeded(), "num_inference_steps": STEPS, "output_type": "pt", **call}
    served = TENSORS or isinstance(pipe, Pipeline) or call["output_type"] != "pt"
    if not served and pipe.unet.dtype == torch.bfloat16:
        pytest.skip("this diffusers makes no images of bfloat16")
    images = pipe(n, **call).images
    if not served and not isinstance(images, Tensor):
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return images


def of_noise(monkeypatch, draws, pipe, dtype=SINGLE, n=2, **call) -> Tensor:
    """diffusers' images of given noise.

    Args:
        draws: x_T and the noise of each step.
        pipe: a pipeline of diffusers, which is spoilt.
        dtype: what it then computes in.
    """
    left = iter(draws)
    pipe.unet.to(dtype)
    with monkeypatch.context() as patch:
        for module in DRAWING:
            patch.setattr(module, "randn_tensor", lambda *args, dtype, **kwargs: next(left).to(dtype))
        images = sample(pipe, n, **call)
    assert not list(left), "there was more noise than diffusers' loop wanted"
    return images
