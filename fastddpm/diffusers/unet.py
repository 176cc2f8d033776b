"""diffusers' `UNet2DModel`, executed by `fastddpm.networks.unet2d` while it samples."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from fastddpm.core.precision import PRECISIONS, Compute
from fastddpm.diffusers.disguise import Disguised
from fastddpm.diffusers.obstacles import can_be_fused, fits
from fastddpm.networks.fused import labelled
from fastddpm.networks.obstacles import remember
from fastddpm.networks.unet2d import with_parameters
from fastddpm.sampling.batch_network import BatchNetwork
from fastddpm.sampling.engine import Engine

DEFAULT_T = 1000  # of a network whose configuration has no num_train_timesteps

_active: "dict[tuple[int, int], FusedCalls]" = {}  # contexts of `sampling`, by thread and id of the network
_engines: "WeakKeyDictionary[nn.Module, tuple[Any, Engine]]" = WeakKeyDictionary()


class UNet2DModel(Disguised, diffusers.UNet2DModel):
    """diffusers' UNet2DModel. `sampling` makes it fast in a user's own loop; our pipelines do so themselves."""

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """A context in which a fused copy of the network serves this thread's calls.

            scheduler.set_timesteps(50)
            with torch.no_grad(), unet.sampling():
                for t in scheduler.timesteps:
                    x = scheduler.step(unet(x, t).sample, t, x).prev_sample

        The copy has the weights at the first call in the context. diffusers' own forward serves calls that need a
        gradient, that pass a one-dimensional tensor of timesteps or a timestep outside the training range (of 1000, if
        the configuration does not say), and all calls of a network with an `obstacle`, which is logged as a warning. In
        each call the host waits for a timestep on a GPU; one on the host avoids that.
        """
        key = threading.get_ident(), id(self)
        if key in _active or not can_be_fused(self):
            yield
            return
        with FusedCalls(self) as _active[key]:
            try:
                yield
            finally:
                del _active[key]

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        """What diffusers' returns: for x_t, [N, C, H, W], and t, one or [N], a UNet2DOutput, or the tuple (tensor,)."""
        fused_calls = _active.get((threading.get_ident(), id(self))) if _active else None
        model_output = None if fused_calls is None else fused_calls(sample, timestep, class_labels)
        if model_output is None:
            return super().forward(sample, timestep, class_labels, return_dict)  # type: ignore[misc]
        return UNet2DOutput(sample=model_output) if return_dict else (model_output,)


class FusedCalls(ExitStack):
    """The calls of a network in one context of `sampling`."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet
        self.T = unet.config.num_train_timesteps or DEFAULT_T
        self.device, self.dtype = unet.device, unet.dtype
        self.parameters = [
            (part._parameters, name, part._parameters[name]) for part in unet.modules() for name in part._parameters
        ]
        self.network: BatchNetwork | None = None
        self.prepared_for: tuple[Any, ...] | None = None  # which calls `network` can serve

    def __call__(self, x: Tensor, timestep: Any, labels: Any) -> Tensor | None:
        """The network's output for x, or None if diffusers' forward has to run."""
        if torch.is_grad_enabled() or x.dtype != self.dtype or not fits(self.unet, x.shape, labels):
            return None
        if any(owner[name] is not parameter for owner, name, parameter in self.parameters):  # as in functional_call
            return None
        if isinstance(timestep, Tensor) and (timestep.ndim or timestep.is_floating_point()):
            return None
        t = int(timestep)
        if not 0 <= t < self.T or x.device != self.device:
            return None
        call = x.shape, current_precision(self.dtype, self.device), None if labels is None else labels.shape
        if self.network is None or self.prepared_for != call:
            self.close()
            engine = shared_engine(self.unet, x.shape[1:], self.T)
            self.network = self.enter_context(engine.network(len(x), capture=engine.captures(self.T)))
            self.prepared_for = call
            self.network.prepare(torch.arange(self.T, device="cpu"), labelled(labels))
            labels = None
        with self.network.working():
            if labels is not None:
                self.network.read_labels(labels)
            model_output = self.network(x, t)
        return model_output.contiguous() if x.is_contiguous() else model_output


@contextmanager
def fused_network(
    unet: Any, timesteps: Tensor, shape: tuple[int, ...], labels: Any = None
) -> Iterator[BatchNetwork | None]:
    """The fused copy of a network for one run, with its current weights; None if there is an obstacle.

    Args:
        timesteps: [S] at which it will be called, on any device.
        shape: [N, C, H, W] of its input.
        labels: [N], for a class-conditional network.
    """
    if not can_be_fused(unet) or timesteps.is_floating_point() or not fits(unet, shape, labels):
        yield None
        return
    engine = shared_engine(unet, shape[1:], max(DEFAULT_T, len(timesteps)))
    with engine.network(shape[0], capture=engine.captures(len(timesteps))) as network:
        network.prepare(timesteps, labelled(labels))
        with network.working():
            yield network


def shared_engine(unet: Any, shape: tuple[int, ...], timesteps: int) -> Engine:
    """An engine that shares the parameters of a network; it is kept until a different one is needed.

    Args:
        shape: (C, H, W) of a sample.
        timesteps: the most that a run visits.
    """
    device, precision = unet.device, current_precision(unet.dtype, unet.device)
    parameters = dict(unet.named_parameters(remove_duplicate=False))
    needed = tuple(shape), timesteps, device, precision, [id(parameter) for parameter in parameters.values()]
    kept = _engines.get(unet)
    if kept is None or kept[0] != needed:
        shared = with_parameters(unet.config, parameters)
        kept = needed, Engine(shared.eval(), tuple(shape), timesteps, Compute(device, precision))
        _engines[unet] = kept
    return kept[1]


def current_precision(dtype: torch.dtype, device: torch.device) -> str:
    """The one of PRECISIONS in which diffusers' forward of a network in dtype would compute now."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype == torch.float32 and device.type == "cuda":
        try:
            return "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
        except RuntimeError:  # the setting was changed by its newer name
            return "tf32" if cast(Any, torch.backends.cudnn).conv.fp32_precision == "tf32" else "fp32"
    return next(name for name, value in PRECISIONS.items() if value == dtype)


remember([UNet2DModel])
