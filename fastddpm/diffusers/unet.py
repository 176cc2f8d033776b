"""diffusers' `UNet2DModel`, executed by `fastddpm.unet` while one samples."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.diffusers.disguise import Disguised
from fastddpm.engine import PRECISIONS, Engine, Forward
from fastddpm.unet import UNet2D

T = 1000  # timesteps that a network is tabulated for, where its configuration does not say

_engines: "WeakKeyDictionary[nn.Module, tuple[Any, Engine]]" = WeakKeyDictionary()


class UNet2DModel(Disguised, diffusers.UNet2DModel):
    """diffusers' UNet2DModel, which `sampling` makes fast for a loop of one's own; in our pipelines it is by itself."""

    _run: "Run | None" = None

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """A context in which this thread's calls, at one timestep for all, are those of a fused copy of the network.

            scheduler.set_timesteps(50)
            with torch.no_grad(), unet.sampling():
                for t in scheduler.timesteps:
                    x = scheduler.step(unet(x, t).sample, t, x).prev_sample

        The copy has the weights of the time the context is entered. Calls that want a gradient, other timesteps for
        each entry, or what else the copy does not do (see `obstacle`) are diffusers' own.
        """
        if self._run is not None or obstacle(self) is not None:
            yield
            return
        with Run(self) as self._run:
            try:
                yield
            finally:
                self._run = None

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        """What diffusers' returns: for x_t, [N, C, H, W], and t, one or [N], a UNet2DOutput, or the tuple (tensor,)."""
        m = None if self._run is None else self._run(sample, timestep, class_labels)
        if m is None:
            return super().forward(sample, timestep, class_labels, return_dict)  # type: ignore[misc]
        return UNet2DOutput(sample=m) if return_dict else (m,)


class Run(ExitStack):
    """The calls of a network in one context of `sampling`."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet, self.T, self.thread = unet, unet.config.num_train_timesteps or T, threading.get_ident()
        self.device, self.dtype, self.labels = unet.device, unet.dtype, None
        self.shape: torch.Size | None = None
        self.forward: Forward | None = None

    def __call__(self, x: Tensor, timestep: Any, labels: Any) -> Tensor | None:
        """What the network makes of x, or None where that is left to diffusers."""
        if torch.is_grad_enabled() or threading.get_ident() != self.thread or x.dtype != self.dtype:
            return None
        if isinstance(timestep, Tensor) and (timestep.ndim or timestep.is_floating_point()):
            return None
        t = int(timestep)
        if not 0 <= t < self.T or x.device != self.device:
            return None
        if self.forward is None or x.shape != self.shape or labels is not self.labels:
            self.close()
            engine = shared_engine(self.unet, x.shape[1:], self.T)
            self.forward = self.enter_context(engine.forward(len(x), self.T))
            self.forward.prepare(torch.arange(self.T), labels)
            self.shape, self.labels = x.shape, labels
        with self.forward.working():
            return self.forward.at(x, t)


@contextmanager
def fused(unet: Any, timesteps: Tensor, shape: tuple[int, ...], labels: Any = None) -> Iterator[Forward | None]:
    """The fused copy of a network for one run, with the weights it has now; None where there is an obstacle.

    Args:
        timesteps: [S] that it will be called at, on any device.
        shape: [N, C, H, W] of the calls.
        labels: [N], for a class-conditional network.
    """
    if obstacle(unet) is not None or timesteps.is_floating_point():
        yield None
        return
    engine = shared_engine(unet, shape[1:], max(T, len(timesteps)))
    with engine.forward(shape[0], len(timesteps)) as forward:
        forward.prepare(timesteps, labels)
        with forward.working():
            yield forward


def obstacle(unet: Any) -> str | None:
    """Why `fastddpm.unet` cannot execute a network as it is now, so that diffusers' forward must; None: it can."""
    if type(unet) not in (diffusers.UNet2DModel, UNet2DModel):
        return f"it is a {type(unet).__name__}; only a plain UNet2DModel has another execution"
    dtype, device = unet.dtype, unet.device  # each walks through all modules
    if dtype not in ops.FLOATS or device.type not in ("cpu", "cuda"):
        return f"it is in {dtype} on {device}; want float32, bfloat16 or float16 on a CPU or a CUDA GPU"
    if unet._compiled_call_impl is not None:
        return "it is compiled"
    if unet.config.out_channels != unet.config.in_channels:
        return f"it returns {unet.config.out_channels} channels for {unet.config.in_channels}"
    if unet.training and unet.config.dropout > 0:
        return "it is in training mode and has dropout; call unet.eval()"
    try:
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in unet.config.items()}
        expected = _shapes(tuple((key, value) for key, value in options.items() if not key.startswith("_")))
    except (ValueError, TypeError) as error:  # TypeError: of what cannot be hashed
        return str(error)
    own = unet.state_dict()
    if {name: value.shape for name, value in own.items()} != expected:
        return "its parameters are not those of its configuration"
    if any(value.dtype != dtype or value.device != device for value in own.values()):
        return "its parameters are not all of one dtype on one device"
    for name, module in unet.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'it'} has hooks or a forward of its own"
        if not type(module).__module__.startswith(("diffusers.", "torch.nn.modules.", "fastddpm.")):
            return f"{name} is a {type(module).__name__}"
        if isinstance(module, Attention) and type(module.processor) not in (AttnProcessor, AttnProcessor2_0):
            return f"{name} has a {type(module.processor).__name__}"
    return None


@lru_cache
def _shapes(config: tuple[tuple[str, Any], ...]) -> dict[str, torch.Size]:
    """Those of the parameters of a network; making one to see them takes longer than a step of it may."""
    with torch.device("meta"):
        return {name: value.shape for name, value in UNet2D(**dict(config)).state_dict().items()}


def shared_engine(unet: Any, shape: tuple[int, ...], timesteps: int) -> Engine:
    """What samples with the parameters of a network, which it shares; kept until another is wanted.

    Args:
        shape: (C, H, W) of a sample.
        timesteps: how many a run visits at most.
    """
    device, precision = unet.device, current_precision(unet)
    parameters = dict(unet.named_parameters())
    wanted = tuple(shape), timesteps, device, precision, [id(parameter) for parameter in parameters.values()]
    kept = _engines.get(unet)
    if kept is None or kept[0] != wanted:
        with torch.device("meta"):
            shared = UNet2D(**unet.config)
        shared.load_state_dict(parameters, assign=True)
        kept = _engines[unet] = wanted, Engine(shared.eval(), tuple(shape), timesteps, device, precision)
    return kept[1]


def current_precision(unet: Any) -> str:
    """One of PRECISIONS: that in which diffusers' forward would compute now."""
    device: torch.device = unet.device
    dtype: torch.dtype = unet.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype == torch.float32 and device.type == "cuda":
        try:
            return "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
        except RuntimeError:  # the newer name of the setting has been used
            return "tf32" if cast(Any, torch.backends.cudnn).conv.fp32_precision == "tf32" else "fp32"
    return next(name for name, value in PRECISIONS.items() if value == dtype)
