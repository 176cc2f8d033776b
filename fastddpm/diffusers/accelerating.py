"""Making a pipeline fast that is there already."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import diffusers

from fastddpm.diffusers.disguise import OURS, adopt
from fastddpm.diffusers.schedulers import Noise, Scheduler, checked
from fastddpm.diffusers.unet import UNet2DModel, obstacle


@dataclass
class Accelerated:
    """What `accelerate` did to the parts of a pipeline: those it replaced, and those it left alone, with the reason."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.replaced.items()]
        return "\n".join(lines + [f"{name}: left alone ({why})" for name, why in self.left.items()])


def accelerate(pipe: Any, *, noise: Noise | None = None) -> Accelerated:
    """Make a pipeline fast in place.

    Its DDPM or DDIM scheduler, its UNet2DModel and the pipeline itself become objects of our classes. They remain the
    same objects, with their state, wherever else they are held: the network can be trained on, and a call of the
    pipeline has the weights of the time it begins. A pipeline of another kind keeps its loop, and makes it in
    `UNet2DModel.sampling` if its network is one.

    Args:
        pipe: any pipeline of diffusers.
        noise: the scheduler's attribute `noise` from now on, see `Scheduler`; None leaves it as it is.
    Returns: what was replaced and what was left alone, and why.
    Raises: ValueError: pipe is no pipeline; noise is not as above, or the scheduler not one that takes it.
    """
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise ValueError(f"pipe is a {type(pipe).__name__}; want a pipeline of diffusers, such as a DDPMPipeline")
    scheduler = getattr(pipe, "scheduler", None)
    if noise is not None and not (type(scheduler) in OURS or isinstance(scheduler, Scheduler)):
        raise ValueError(
            f"noise is {noise!r}, but the scheduler is a {type(scheduler).__name__}, which draws its own; leave it out"
        )
    noise = None if noise is None else checked(noise)
    report = Accelerated()
    for name, part in pipe.components.items():  # type: ignore[attr-defined]
        why = _left(part)
        if why is not None:
            report.left[name] = why
        else:
            report.replaced[name] = _named(adopt(part))
    if noise is not None:
        scheduler.noise = noise  # type: ignore[union-attr]
    unet = getattr(pipe, "unet", None)
    if type(pipe) in OURS:
        report.replaced["pipeline"] = _named(adopt(pipe))
    elif type(pipe) in OURS.values() or "_loop" in vars(type(pipe)):
        report.left["pipeline"] = "it is ours already"
    elif isinstance(unet, UNet2DModel):
        pipe.__class__ = _sampling(type(pipe))
        report.replaced["pipeline"] = f"{type(pipe).__name__}, whose loop calls the fused network"
    else:
        report.left["pipeline"] = f"the loop of a {type(pipe).__name__} is its own; it calls what was replaced"
    return report


def _left(part: Any) -> str | None:
    """Why a part is left alone, if it is."""
    if isinstance(part, UNet2DModel | Scheduler):
        return "it is ours already"
    if type(part) is diffusers.UNet2DModel:
        return obstacle(part)
    if type(part) in OURS:
        return None
    kind = "None" if part is None else f"a {type(part).__name__}"
    return f"it is {kind}, and only schedulers of DDPM and DDIM and a UNet2DModel are replaced"


def _named(part: Any) -> str:
    return f"diffusers' {type(part).__name__} is now fastddpm's"


def _sampling(pipeline: type) -> type:
    """A class of the same name, whose calls are made in `UNet2DModel.sampling`."""

    @wraps(pipeline.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        unet = adopt(self.unet)  # which may be another one by now
        with unet.sampling() if isinstance(unet, UNet2DModel) else nullcontext():
            return pipeline.__call__(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _sampling_again, (pipeline,), vars(self)  # a class without a place of its own cannot be pickled

    body = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "_loop": pipeline}
    return type(
        pipeline.__name__, (pipeline,), {**body, "__module__": pipeline.__module__, "__doc__": pipeline.__doc__}
    )


def _sampling_again(pipeline: type) -> Any:
    made: Any = object.__new__(pipeline)
    made.__class__ = _sampling(pipeline)
    return made
