"""What prevents a fused copy or a CUDA graph of a diffusers network, so that diffusers' own forward has to run."""

import logging
from functools import lru_cache
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.unets import unet_2d, unet_2d_blocks
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.diffusers.disguise import OURS
from fastddpm.networks.obstacles import (
    ALIKE,
    HOOKS,
    Obstacles,
    Part,
    called_as_it_is,
    global_hooks,
    obstacles,
    parts,
    remember,
)
from fastddpm.networks.unet2d import UNet2D

logger = logging.getLogger(__name__)

_warned_of: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()


class Diverted:
    """The base class of what this package assigns to a network as its forward while a pipeline runs."""


def obstacle(unet: Any) -> str | None:
    """Why `networks.unet2d` cannot execute a network as it is now, so that diffusers' forward must; None: it can."""
    return next(iter(_obstacles(unet)), None)


def can_be_fused(unet: Any) -> bool:
    """Whether there is no `obstacle`; otherwise logs it as a warning, once for each network."""
    found = _obstacles(unet)
    if not found:
        return True
    _warn_once(unet, called_as_it_is(type(unet).__name__, found))
    return False


def obstacle_to_capture(unet: nn.Module) -> str | None:
    """Why no graph can take the place of a network's forward: Python has to run in each call; None: one can.

    Hooks of the network itself run outside of its forward, so they do not prevent a capture.
    """
    if any(map(global_hooks, HOOKS)):
        return "torch has global module hooks"
    for name, module in unet.named_modules():
        attributes, it = vars(module), name or "it"
        if "_hf_hook" in attributes:
            return f"{it} is moved between devices in each run, as by enable_model_cpu_offload"
        if has_own_forward(module) and not isinstance(attributes["forward"], Diverted):
            return f"{it} has another forward, which was assigned to it"
        if module is not unet and any(attributes[hooks] for hooks in HOOKS):
            return f"{it} has hooks"
        if attributes.get("_compiled_call_impl") is not None:
            return f"{it} is compiled"
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            return f"{it} is in training mode; call unet.eval()"
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Whether another forward than that of its class was assigned to a module."""
    forward = vars(module).get("forward")
    # accelerate leaves the method itself behind when it removes a hook
    same = isinstance(forward, MethodType) and (forward.__self__, forward.__func__) == (module, type(module).forward)
    return forward is not None and not same


def can_be_captured(unet: nn.Module) -> bool:
    """Whether there is no `obstacle_to_capture`; otherwise logs it as a warning, once for each network."""
    reason = obstacle_to_capture(unet)
    if reason is not None:
        warn_of_forward(unet, reason)
    return reason is None


def warn_of_forward(unet: nn.Module, reason: str) -> None:
    """Log, once for each network and reason, that its calls are not replays of a graph."""
    _warn_once(unet, f"calls of this {type(unet).__name__} run as they are, without a CUDA graph: {reason}")


def _warn_once(unet: nn.Module, text: str) -> None:
    warned = _warned_of.setdefault(unet, set())
    if text not in warned:
        warned.add(text)
        logger.warning(text)


def fits(unet: Any, shape: tuple[int, ...], labels: Any) -> bool:
    """Whether a network accepts samples, [N, C, H, W], and labels; if not, diffusers raises the error."""
    factor = 1 << (len(unet.config.block_out_channels) - 1)
    sizes = len(shape) == 4 and shape[1] == unet.config.in_channels and all(side % factor == 0 for side in shape[2:])
    labelled = labels is None or (isinstance(labels, Tensor) and labels.shape[:1] == shape[:1])
    return sizes and labelled and 0 not in shape and (labels is None) == (unet.class_embedding is None)


def _obstacles(unet: Any) -> Obstacles:
    if type(unet) not in (diffusers.UNet2DModel, OURS.get(diffusers.UNet2DModel)):
        return {f"it is a {type(unet).__name__}; only a plain UNet2DModel can be fused": type(unet)}
    if unet.config.out_channels != unet.config.in_channels:
        return {f"it returns {unet.config.out_channels} channels for {unet.config.in_channels}": None}
    try:
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in unet.config.items()}
        expected = _as_configured(tuple((k, v) for k, v in options.items() if not k.startswith("_")))
    except (ValueError, TypeError) as error:  # TypeError: an option cannot be hashed
        return {str(error): None}
    found = obstacles(unet, expected)
    tensors = [*unet.parameters(), *unet.buffers()]
    dtypes, devices = {value.dtype for value in tensors}, {value.device for value in tensors}
    if len(dtypes) > 1 or len(devices) > 1:
        found["its parameters are not all of one dtype on one device"] = None
    if not dtypes <= set(ops.FLOATS) or not {device.type for device in devices} <= {"cpu", "cuda"}:
        want = "want float32, bfloat16 or float16 on a CPU or a CUDA GPU"
        found[f"it is in {unet.dtype} on {unet.device}; {want}"] = None
    for name, module in unet.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            found[f"{name} is in training mode; call unet.eval()"] = None
    return found


@lru_cache
def _as_configured(config: tuple[tuple[str, Any], ...]) -> dict[str, Part]:
    """The parts of a network with these options.

    Raises: ValueError: `fastddpm.networks.unet2d` does not have an option, or makes other parameters of them.
    """
    with torch.device("meta"):
        ours = UNet2D(**dict(config))
        theirs: Any = diffusers.UNet2DModel(**dict(config))
    shapes, wanted = ({name: x.shape for name, x in net.named_parameters()} for net in (ours, theirs))
    if shapes != wanted:
        raise ValueError("its parameters are not those of a UNet2D of its configuration")
    return parts(theirs)


ALIKE[AttnProcessor] = AttnProcessor2_0
remember([*vars(unet_2d).values(), *vars(unet_2d_blocks).values()])
