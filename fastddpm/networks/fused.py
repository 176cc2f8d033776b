"""The networks of this package, `UNet2D` and `UNet1D`: the sampler calls a copy of them that is fused for inference."""

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastddpm.networks import fused_unet1d, planned, planned_unet1d, unet1d, unet2d
from fastddpm.networks.config import complete_config, least_parameters
from fastddpm.networks.fused_unet1d import FusedUNet1D
from fastddpm.networks.obstacles import Obstacles
from fastddpm.networks.unet1d import UNet1D
from fastddpm.networks.unet2d import UNet2D

Network = UNet2D | UNet1D
Fused = UNet2D | FusedUNet1D  # the copies

LABELS, CONDITION = "class_labels", "global_cond"  # the arguments of these networks besides x and t


def kind_of(config: Mapping[str, Any]) -> type[Network]:
    """The network that a configuration is of."""
    return UNet1D if "input_dim" in config else UNet2D


def completed(config: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """(all options of a network, a lower bound on its parameters). Raises: ValueError: an option is not supported."""
    if kind_of(config) is UNet1D:
        complete = unet1d.complete_config(config)
        return complete, unet1d.least_parameters(complete)
    complete = complete_config(config)
    return complete, least_parameters(complete)


def is_own(model: Any) -> TypeGuard[Network]:
    """Whether a model is a network of this package."""
    return isinstance(model, Network)


def kind_name(model: Any) -> str:
    """What messages call a network of this package, also one of a subclass."""
    return "UNet1D" if isinstance(model, UNet1D) else "UNet2D"


def argument_of(net: Network) -> str | None:
    """Which argument a network takes besides x and t; None: it takes none."""
    if net.class_embedding is not None:
        return LABELS
    return CONDITION if net.config.get("global_cond_dim") else None


def labelled(labels: Tensor | None) -> dict[str, Tensor]:
    """The class labels as keyword arguments of a network; none if labels is None."""
    return {} if labels is None else {LABELS: labels}


def obstacles_of(net: Network) -> Obstacles:
    """What rules out a fused copy: anything besides the configuration and the parameters that affects the output."""
    return fused_unet1d.obstacles_of(net) if isinstance(net, UNet1D) else unet2d.network_obstacles(net)


def fused(net: Network, dtype: torch.dtype, device: torch.device, *, pack: bool) -> Fused:
    """A copy for inference, see `UNet2D.for_inference`."""
    if isinstance(net, UNet1D):
        return fused_unet1d.for_inference(net, dtype, device, pack=pack)
    return net.for_inference(dtype, device, pack=pack)


def refresh(copy: Fused, net: Network) -> None:
    """Give a copy the weights that its network has now."""
    copy.refresh(net)  # type: ignore[arg-type]


def fastest_forward(copy: Fused) -> Callable[[Tensor, Tensor], Tensor]:
    """What evaluates a copy, with the arguments of its `denoise`: if possible a program of C++ kernels."""
    if isinstance(copy, UNet2D):
        return planned.fastest_forward(copy)
    has_programs = planned.has_programs(copy.out.weight)
    return planned.PlannedUNet(copy, planned_unet1d.SequenceBuilder) if has_programs else copy.denoise
