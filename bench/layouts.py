"""The networks that are measured, with random weights, and the work of their forward passes."""

import math
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.machine import DEVICE, SCALE
from fastddpm import UNet2D, checkpoints, ops
from fastddpm.core import layout
from fastddpm.core.precision import PRECISIONS
from fastddpm.networks.layers import FUSED, GroupNorm
from fastddpm.sampling.arguments import sample_shape

CIFAR10 = {  # google/ddpm-cifar10-32
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "sample_size": 32,
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
CELEBAHQ = {  # google/ddpm-celebahq-256
    **CIFAR10,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "sample_size": 256,
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
TINY = {  # a small network of the same kind, to check that everything runs
    **CIFAR10,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
LAYOUTS = {"cifar10-32": CIFAR10, "celebahq-256": CELEBAHQ}
if SCALE == "tiny":
    LAYOUTS = dict.fromkeys(LAYOUTS, TINY)


@cache
def network(name: str) -> UNet2D:
    """Return a layout with random weights, or "shipped", the model in the package; float32, on the device."""
    torch.manual_seed(0)
    net = UNet2D(**_config(name))
    if name == "shipped":
        checkpoints.load_into(net, checkpoints.load(checkpoints.shipped_model()).parameters)
    return net.to(DEVICE).eval()


def _config(name: str) -> dict[str, Any]:
    return checkpoints.load(checkpoints.shipped_model()).config if name == "shipped" else LAYOUTS[name]


class Norm(NamedTuple):
    """A group norm of the network as built for a GPU; shapes are those of one sample."""

    shape: tuple[int, ...]
    skip: tuple[int, ...] | None  # of the second input, if there is one
    groups: int
    eps: float
    add: bool  # whether the time bias is added
    act: str | None


@cache
def norms(name: str) -> Counter[Norm]:
    """Count the group norms of one forward pass, in order."""
    found: Counter[Norm] = Counter()

    def record(norm, args, options):
        x, act, skip, add = args[0], args[1] if len(args) > 1 else None, options.get("skip"), options.get("add")
        skip_shape = None if skip is None else tuple(skip.shape[1:])
        found[Norm(tuple(x.shape[1:]), skip_shape, norm.num_groups, norm.eps, add is not None, FUSED.get(act))] += 1

    with ops.forced_backend("triton"):
        net = _on_meta(name).for_inference(torch.bfloat16, "meta")
    for module in net.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(record, with_kwargs=True)
        elif isinstance(module, nn.Conv2d):  # on "meta" its result is not channels-last
            module.register_forward_hook(lambda conv, args, y: layout.channels_last(y))
    _forward(net)
    return found


@cache
def flops(name: str) -> int:
    """Return the floating-point operations per image and step; a multiplication and an addition count as two.

    These are the convolutions and matrix products of the plain network, including attention's. Tables that depend on t
    alone do not count, and a fast path that saves operations does not reduce the number.
    """
    net = _on_meta(name)
    with FlopCounterMode(display=False) as counter:
        _forward(net)
    return counter.get_total_flops()


@cache
def traffic(name: str, batch: int, itemsize: int) -> int:
    """Return the bytes that a forward pass moves if each convolution, product and norm reads its input and weights once
    and writes its output once, and everything else is fused into them. A network in one kernel would need less, most
    networks that run layer by layer need more."""
    elements = {"each": 0, "once": 0}

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        elements["each"] += args[0].numel() + y.numel()
        elements["once"] += sum(parameter.numel() for parameter in module.parameters())

    net = _on_meta(name)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            module.register_forward_hook(count)
    _forward(net)
    return itemsize * (batch * elements["each"] + elements["once"])


def moved(model: str, batch: int, precision: str) -> int:
    """Return the bytes of a step: the network, the state read and written, and its copy in a lower precision."""
    itemsize, state = PRECISIONS[precision].itemsize, batch * math.prod(sample_shape(network(model)))
    return traffic(model, batch, itemsize) + state * (8 + itemsize * (2 if itemsize < 4 else 1))


def _on_meta(name: str) -> UNet2D:
    config = _config(name)
    with torch.device("meta"):
        return UNet2D(**config)


@torch.no_grad()
def _forward(net: UNet2D) -> None:
    """Of one image."""
    x = torch.empty(1, *sample_shape(net), dtype=net.conv_in.weight.dtype, device="meta")
    net.denoise(x, torch.empty(1, sum(resnet.columns for resnet in net.resnets), device="meta"))
