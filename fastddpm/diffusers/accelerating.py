"""Acceleration of an existing pipeline, in place."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import diffusers

from fastddpm.diffusers.captured import capturing, forget
from fastddpm.diffusers.disguise import OURS, adopt
from fastddpm.diffusers.noise_sources import Noise, checked_noise
from fastddpm.diffusers.obstacles import obstacle, obstacle_to_capture
from fastddpm.diffusers.scheduler_base import Scheduler
from fastddpm.diffusers.unet import UNet2DModel


@dataclass
class Accelerated:
    """What `accelerate` did: the parts of a pipeline it replaced, and those it left alone, with the reason."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.replaced.items()]
        return "\n".join(lines + [f"{name}: left alone ({why})" for name, why in self.left.items()])


def accelerate(pipe: Any, *, noise: Noise | None = None) -> Accelerated:
    """Make a pipeline fast in place.

    Its DDPM or DDIM scheduler, its UNet2DModel and the pipeline itself change their class to ours. They stay the same
    objects with the same state, also where other code holds them: the network can still be trained, and each call of
    the pipeline uses its current weights. A pipeline of another kind keeps its loop; if its network is a UNet2DModel,
    the loop runs in `UNet2DModel.sampling`. If it is a UNet2DConditionModel, as in Stable Diffusion, the network stays
    as it is, and on a GPU the loop replays diffusers' forward as a CUDA graph, which is captured again when the network
    was changed; calling `accelerate` again frees these graphs.

    Args:
        pipe: any pipeline of diffusers.
        noise: the new value of the scheduler's attribute `noise`, see `Scheduler`; None leaves it as it is.
    Returns: what was replaced, and what was left alone and why.
    Raises: ValueError: pipe is not a pipeline; noise is not as above, or the scheduler does not accept it.
    """
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise ValueError(f"pipe is a {type(pipe).__name__}; want a pipeline of diffusers, such as a DDPMPipeline")
    scheduler = getattr(pipe, "scheduler", None)
    if noise is not None and not (type(scheduler) in OURS or isinstance(scheduler, Scheduler)):
        raise ValueError(
            f"noise is {noise!r}, but the scheduler is a {type(scheduler).__name__}, which draws its own; leave it out"
        )
    noise = None if noise is None else checked_noise(noise)
    report = Accelerated()
    for name, part in pipe.components.items():  # type: ignore[attr-defined]
        if name == "unet" and isinstance(part, diffusers.UNet2DConditionModel):
            continue  # its calls are replaced, not the network
        reason = _reason_to_leave(part)
        if reason is not None:
            report.left[name] = reason
        else:
            report.replaced[name] = _replacement(adopt(part))
    if noise is not None:
        scheduler.noise = noise  # type: ignore[union-attr]
    _accelerate_loop(pipe, report)
    return report


def _accelerate_loop(pipe: Any, report: Accelerated) -> None:
    """Change the class of a pipeline whose parts have been replaced, and add this to the report."""
    unet = getattr(pipe, "unet", None)
    if type(pipe) in OURS:
        report.replaced["pipeline"] = _replacement(adopt(pipe))
    elif type(pipe) in OURS.values() or "_loop" in vars(type(pipe)):
        report.left["pipeline"] = "it is already fastddpm's"
    elif isinstance(unet, UNet2DModel):
        pipe.__class__ = _sampling_class(type(pipe))
        report.replaced["pipeline"] = f"{type(pipe).__name__}, whose loop now calls the fused network"
    elif isinstance(unet, diffusers.UNet2DConditionModel):
        pipe.__class__ = _sampling_class(type(pipe))
        report.replaced["pipeline"] = f"{type(pipe).__name__}, whose loop replays the network as a CUDA graph on a GPU"
    else:
        report.left["pipeline"] = f"a {type(pipe).__name__} keeps its own loop, which calls the replaced parts"
    if isinstance(unet, diffusers.UNet2DConditionModel):
        forget(unet)
        reason = _reason_not_to_capture(unet)
        if reason is None:
            report.replaced["unet"] = f"calls of the {type(unet).__name__} are replays of a CUDA graph"
        else:
            report.left["unet"] = reason


def _reason_not_to_capture(unet: Any) -> str | None:
    """Why the calls of a network are not replays of a CUDA graph, as it is now; None: they are."""
    reason = obstacle_to_capture(unet)
    if reason is None and unet.device.type != "cuda":
        return f"it is on a {unet.device.type}, where diffusers' forward runs; on a GPU its calls replay a CUDA graph"
    return reason


def _reason_to_leave(part: Any) -> str | None:
    """Why a part is left alone; None: it can be replaced."""
    if isinstance(part, UNet2DModel | Scheduler):
        return "it is already fastddpm's"
    if type(part) is diffusers.UNet2DModel:
        return obstacle(part)
    if type(part) in OURS:
        return None
    kind = "None" if part is None else f"a {type(part).__name__}"
    return f"it is {kind}; only DDPM and DDIM schedulers and a UNet2DModel are replaced"


def _replacement(part: Any) -> str:
    """The report's text for a part that is now ours."""
    return f"diffusers' {type(part).__name__} is now fastddpm's"


def _sampling_class(pipeline: type) -> type:
    """A subclass of the same name, whose calls run in `UNet2DModel.sampling` or in `capturing`."""

    @wraps(pipeline.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _fast_calls(adopt(self.unet)):  # the user may have assigned another network
            return pipeline.__call__(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _sampling_again, (pipeline,), vars(self)  # pickle could not import this class by its name

    attributes = {"__module__": pipeline.__module__, "__doc__": pipeline.__doc__, "_loop": pipeline}
    methods = {"__call__": __call__, "__reduce_ex__": __reduce_ex__}
    return type(pipeline.__name__, (pipeline,), {**attributes, **methods})


def _fast_calls(unet: Any) -> AbstractContextManager[None]:
    """The context in which this thread's calls of a network are fast."""
    if isinstance(unet, UNet2DModel):
        return unet.sampling()
    return capturing(unet) if isinstance(unet, diffusers.UNet2DConditionModel) else nullcontext()


def _sampling_again(pipeline: type) -> Any:
    """An empty instance of `_sampling_class(pipeline)`, for unpickling."""
    instance: Any = object.__new__(pipeline)
    instance.__class__ = _sampling_class(pipeline)
    return instance
