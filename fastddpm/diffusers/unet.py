"""diffusers' `UNet2DModel`, executed by `fastddpm.networks.unet2d` while one samples."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from fastddpm import ops
from fastddpm.diffusers.disguise import Disguised
from fastddpm.networks.unet2d import UNet2D
from fastddpm.sampling.engine import PRECISIONS, Engine, Forward

T = 1000  # timesteps that a network is tabulated for, where its configuration does not say

_runs: "dict[tuple[int, int], Run]" = {}  # those under way, by thread and id of the network
_engines: "WeakKeyDictionary[nn.Module, tuple[Any, Engine]]" = WeakKeyDictionary()


class UNet2DModel(Disguised, diffusers.UNet2DModel):
    """diffusers' UNet2DModel, which `sampling` makes fast for a loop of one's own; in our pipelines it is by itself."""

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """A context in which this thread's calls, at one timestep for all, are those of a fused copy of the network.

            scheduler.set_timesteps(50)
            with torch.no_grad(), unet.sampling():
                for t in scheduler.timesteps:
                    x = scheduler.step(unet(x, t).sample, t, x).prev_sample

        The copy has the weights of the first of these calls. Calls that want a gradient, at timesteps in a tensor of
        one dimension or beyond those the network was trained for (1000, if it does not say), or what else the copy does
        not do (see `obstacle`) are diffusers' own. A timestep on a GPU is waited for in each call; one on the host is
        not.
        """
        key = threading.get_ident(), id(self)
        if key in _runs or obstacle(self) is not None:
            yield
            return
        with Run(self) as _runs[key]:
            try:
                yield
            finally:
                del _runs[key]

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        """What diffusers' returns: for x_t, [N, C, H, W], and t, one or [N], a UNet2DOutput, or the tuple (tensor,)."""
        run = _runs.get((threading.get_ident(), id(self))) if _runs else None
        m = None if run is None else run(sample, timestep, class_labels)
        if m is None:
            return super().forward(sample, timestep, class_labels, return_dict)  # type: ignore[misc]
        return UNet2DOutput(sample=m) if return_dict else (m,)


class Run(ExitStack):
    """The calls of a network in one context of `sampling`."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet, self.T = unet, unet.config.num_train_timesteps or T
        self.device, self.dtype = unet.device, unet.dtype
        self.parameters = [
            (part._parameters, name, part._parameters[name]) for part in unet.modules() for name in part._parameters
        ]
        self.like: tuple[Any, ...] | None = None  # of the calls that `forward` is for
        self.forward: Forward | None = None

    def __call__(self, x: Tensor, timestep: Any, labels: Any) -> Tensor | None:
        """What the network makes of x, or None where that is left to diffusers."""
        if torch.is_grad_enabled() or x.dtype != self.dtype or not fits(self.unet, x.shape, labels):
            return None
        if any(parts[name] is not parameter for parts, name, parameter in self.parameters):  # as by functional_call
            return None
        if isinstance(timestep, Tensor) and (timestep.ndim or timestep.is_floating_point()):
            return None
        t = int(timestep)
        if not 0 <= t < self.T or x.device != self.device:
            return None
        like = x.shape, current_precision(self.dtype, self.device), None if labels is None else labels.shape
        if self.forward is None or self.like != like:
            self.close()
            engine = shared_engine(self.unet, x.shape[1:], self.T)
            self.forward, self.like = self.enter_context(engine.forward(len(x), self.T)), like
            self.forward.prepare(torch.arange(self.T), labels)
            labels = None
        with self.forward.working():
            if labels is not None:
                cast(Tensor, self.forward.labels).copy_(labels)
            m = self.forward.at(x, t)
        return m.contiguous() if x.is_contiguous() else m


@contextmanager
def fused(unet: Any, timesteps: Tensor, shape: tuple[int, ...], labels: Any = None) -> Iterator[Forward | None]:
    """The fused copy of a network for one run, with the weights it has now; None where there is an obstacle.

    Args:
        timesteps: [S] that it will be called at, on any device.
        shape: [N, C, H, W] of the calls.
        labels: [N], for a class-conditional network.
    """
    if obstacle(unet) is not None or timesteps.is_floating_point() or not fits(unet, shape, labels):
        yield None
        return
    engine = shared_engine(unet, shape[1:], max(T, len(timesteps)))
    with engine.forward(shape[0], len(timesteps)) as forward:
        forward.prepare(timesteps, labels)
        with forward.working():
            yield forward


def obstacle(unet: Any) -> str | None:
    """Why `networks.unet2d` cannot execute a network as it is now, so that diffusers' forward must; None: it can."""
    if type(unet) not in (diffusers.UNet2DModel, UNet2DModel):
        return f"it is a {type(unet).__name__}; only a plain UNet2DModel has another execution"
    if unet._compiled_call_impl is not None:
        return "it is compiled"
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "there are global hooks of modules"
    if unet.config.out_channels != unet.config.in_channels:
        return f"it returns {unet.config.out_channels} channels for {unet.config.in_channels}"
    try:
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in unet.config.items()}
        expected, shapes = _as_configured(tuple((k, v) for k, v in options.items() if not k.startswith("_")))
    except (ValueError, TypeError) as error:  # TypeError: of what cannot be hashed
        return str(error)
    tensors = unet.state_dict()
    if {name: value.shape for name, value in tensors.items()} != shapes:
        return "its parameters are not those of its configuration"
    dtypes, devices = {value.dtype for value in tensors.values()}, {value.device for value in tensors.values()}
    if len(dtypes) > 1 or len(devices) > 1:
        return "its parameters are not all of one dtype on one device"
    if not dtypes <= set(ops.FLOATS) or not {device.type for device in devices} <= {"cpu", "cuda"}:
        return f"it is in {unet.dtype} on {unet.device}; want float32, bfloat16 or float16 on a CPU or a CUDA GPU"
    modules = dict(unet.named_modules())
    for name, module in modules.items():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'it'} has hooks or a forward of its own"
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            return f"{name} is in training mode; call unet.eval()"
        told = vars(module) | {"": type(module)}
        for key, value in expected.get(name, {}).items():
            if (_told(told[key]) if key in told else None) != value:
                return f"{name or 'it'} is not as configured: {key or 'its type'} is {_told(told.get(key))}"
    return None if modules.keys() == expected.keys() else "its modules are not those of its configuration"


def fits(unet: Any, shape: tuple[int, ...], labels: Any) -> bool:
    """Whether samples, [N, C, H, W], and labels are what a network wants; where not, diffusers says so."""
    factor = 1 << (len(unet.config.block_out_channels) - 1)
    sizes = len(shape) == 4 and shape[1] == unet.config.in_channels and all(side % factor == 0 for side in shape[2:])
    labelled = labels is None or (isinstance(labels, Tensor) and labels.shape[:1] == shape[:1])
    return sizes and labelled and 0 not in shape and (labels is None) == (unet.class_embedding is None)


@lru_cache
def _as_configured(config: tuple[tuple[str, Any], ...]) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Size]]:
    """What the modules of a network of these options are told, and the shapes of its parameters.

    Raises: ValueError: `fastddpm.networks.unet2d` does not have an option.
    """
    with torch.device("meta"):
        ours, theirs = UNet2D(**dict(config)), diffusers.UNet2DModel(**dict(config))
    expected = {
        name: {key: _told(value) for key, value in (vars(module) | {"": type(module)}).items() if _tells(key, value)}
        for name, module in theirs.named_modules()  # type: ignore[attr-defined]
    }
    del expected[""][""]  # the whole may be of our class
    return expected, {name: value.shape for name, value in ours.state_dict().items()}


def _tells(key: str, value: Any) -> bool:
    """Whether an attribute of a module decides what it computes."""
    return (
        not key.startswith("_") and key not in ("training", "gradient_checkpointing") and not isinstance(value, Tensor)
    )


def _told(value: Any) -> Any:
    """An attribute, or its type where that tells it apart; two processors of attention do the same."""
    if isinstance(value, type | int | float | str | tuple | None):
        return value
    return AttnProcessor2_0 if isinstance(value, AttnProcessor) else type(value)


def shared_engine(unet: Any, shape: tuple[int, ...], timesteps: int) -> Engine:
    """What samples with the parameters of a network, which it shares; kept until another is wanted.

    Args:
        shape: (C, H, W) of a sample.
        timesteps: how many a run visits at most.
    """
    device, precision = unet.device, current_precision(unet.dtype, unet.device)
    parameters = dict(unet.named_parameters())
    wanted = tuple(shape), timesteps, device, precision, [id(parameter) for parameter in parameters.values()]
    kept = _engines.get(unet)
    if kept is None or kept[0] != wanted:
        with torch.device("meta"):
            shared = UNet2D(**unet.config)
        for name, parameter in parameters.items():
            module, _, leaf = name.rpartition(".")
            shared.get_submodule(module)._parameters[leaf] = parameter  # load_state_dict would set its requires_grad
        kept = _engines[unet] = wanted, Engine(shared.eval(), tuple(shape), timesteps, device, precision)
    return kept[1]


def current_precision(dtype: torch.dtype, device: torch.device) -> str:
    """One of PRECISIONS: that in which diffusers' forward of a network in dtype would compute now."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype == torch.float32 and device.type == "cuda":
        try:
            return "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
        except RuntimeError:  # the newer name of the setting has been used
            return "tf32" if cast(Any, torch.backends.cudnn).conv.fp32_precision == "tf32" else "fp32"
    return next(name for name, value in PRECISIONS.items() if value == dtype)
