"""What prevents a fused copy of a diffusers network, so that diffusers' own forward has to run."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from fastddpm import ops
from fastddpm.diffusers.disguise import OURS
from fastddpm.networks.unet2d import UNet2D


def obstacle(unet: Any) -> str | None:
    """Why `networks.unet2d` cannot execute a network as it is now, so that diffusers' forward must; None: it can."""
    return next(_obstacles(unet), None)


def fits(unet: Any, shape: tuple[int, ...], labels: Any) -> bool:
    """Whether a network accepts samples, [N, C, H, W], and labels; if not, diffusers raises the error."""
    factor = 1 << (len(unet.config.block_out_channels) - 1)
    sizes = len(shape) == 4 and shape[1] == unet.config.in_channels and all(side % factor == 0 for side in shape[2:])
    labelled = labels is None or (isinstance(labels, Tensor) and labels.shape[:1] == shape[:1])
    return sizes and labelled and 0 not in shape and (labels is None) == (unet.class_embedding is None)


def _obstacles(unet: Any) -> Iterator[str]:
    if type(unet) not in (diffusers.UNet2DModel, OURS.get(diffusers.UNet2DModel)):
        yield f"it is a {type(unet).__name__}; only a plain UNet2DModel can be fused"
        return
    if unet._compiled_call_impl is not None:
        yield "it is compiled"
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        yield "torch has global module hooks"
    if unet.config.out_channels != unet.config.in_channels:
        yield f"it returns {unet.config.out_channels} channels for {unet.config.in_channels}"
    try:
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in unet.config.items()}
        expected, shapes = _as_configured(tuple((k, v) for k, v in options.items() if not k.startswith("_")))
    except (ValueError, TypeError) as error:  # TypeError: an option cannot be hashed
        yield str(error)
        return
    yield from _obstacles_of_tensors(unet, shapes)
    yield from _obstacles_of_modules(unet, expected)


def _obstacles_of_tensors(unet: Any, shapes: dict[str, torch.Size]) -> Iterator[str]:
    """Args: shapes: the expected ones, by name."""
    tensors = unet.state_dict()
    if {name: value.shape for name, value in tensors.items()} != shapes:
        yield "its parameters are not those of its configuration"
    dtypes, devices = {value.dtype for value in tensors.values()}, {value.device for value in tensors.values()}
    if len(dtypes) > 1 or len(devices) > 1:
        yield "its parameters are not all of one dtype on one device"
    if not dtypes <= set(ops.FLOATS) or not {device.type for device in devices} <= {"cpu", "cuda"}:
        yield f"it is in {unet.dtype} on {unet.device}; want float32, bfloat16 or float16 on a CPU or a CUDA GPU"


def _obstacles_of_modules(unet: Any, expected: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Args: expected: the attributes of each module, by its name."""
    modules = dict(unet.named_modules())
    for name, module in modules.items():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            yield f"{name or 'it'} has hooks, or its forward was replaced"
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            yield f"{name} is in training mode; call unet.eval()"
        attributes = vars(module) | {"": type(module)}
        for key, value in expected.get(name, {}).items():
            if (_comparable(attributes[key]) if key in attributes else None) != value:
                came = _comparable(attributes.get(key))
                yield f"{name or 'it'} is not as configured: {key or 'its type'} is {came}"
    if modules.keys() != expected.keys():
        yield "its modules are not those of its configuration"


@lru_cache
def _as_configured(config: tuple[tuple[str, Any], ...]) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Size]]:
    """The attributes of the modules of a network with these options, and the shapes of its parameters.

    Raises: ValueError: `fastddpm.networks.unet2d` does not have an option.
    """
    with torch.device("meta"):
        ours, theirs = UNet2D(**dict(config)), diffusers.UNet2DModel(**dict(config))
    expected = {
        name: {
            key: _comparable(value)
            for key, value in (vars(module) | {"": type(module)}).items()
            if _affects_output(key, value)
        }
        for name, module in theirs.named_modules()  # type: ignore[attr-defined]
    }
    del expected[""][""]  # the network itself may be of our class
    return expected, {name: value.shape for name, value in ours.state_dict().items()}


def _affects_output(key: str, value: Any) -> bool:
    """Whether an attribute of a module may decide what it computes."""
    return (
        not key.startswith("_") and key not in ("training", "gradient_checkpointing") and not isinstance(value, Tensor)
    )


def _comparable(value: Any) -> Any:
    """An attribute that can be compared, or its type; diffusers' two attention processors count as the same."""
    if isinstance(value, type | int | float | str | tuple | None):
        return value
    return AttnProcessor2_0 if isinstance(value, AttnProcessor) else type(value)
