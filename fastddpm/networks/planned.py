"""A fused `UNet2D` on a CPU as a program of C++ kernels, in fp32 or native bf16: one call evaluates the network.

A program is made for each shape of the input. All of its memory is one block, in which buffers are reused as soon as
nothing reads them any more, and weights are packed once. Biases, residuals and the time are added within the
convolutions and norms; skips are read in place.
"""

from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.core import layout
from fastddpm.kernels.cpu.native import native  # type: ignore[import-not-found]  # noqa: TID253 (it needs no Triton)
from fastddpm.kernels.cpu.program import (  # type: ignore[import-not-found]  # noqa: TID253 (it needs no Triton)
    Images,
    Program,
    Rows,
    Weights,
    given,
    pack,
)
from fastddpm.networks.fused_unet1d import FusedUNet1D
from fastddpm.networks.layers import FUSED, Attention, Block, Conv2d, Downsample, GroupNorm, Pool, Upsample
from fastddpm.networks.resnet import Resnet
from fastddpm.networks.unet2d import UNet2D

Pack = Callable[[Tensor, bool], Weights]  # (weight, whether for Winograd's method)

MOST_SHAPES = 8  # programs that are kept
LEAST_SIDE = 4  # of images for Winograd's method: it sums the zeros around smaller ones, too, and rounds more
LEAST_CHANNELS = 32  # for which Winograd's method is faster, and as accurate even without fused multiply-adds
X, ROWS, Y = 1, 2, 3  # the pointers that a program is given


def fastest_forward(net: UNet2D) -> Callable[[Tensor, Tensor], Tensor]:
    """What evaluates a copy by `for_inference`: a program if it can be one, else `net.denoise`, which has the same
    arguments."""
    return PlannedUNet(net) if _can_be_planned(net) else net.denoise


def has_programs(weight: Tensor) -> bool:
    """Whether there are C++ kernels for the device and the dtype of a network's weights."""
    multiplies = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and native().module.bfloat16())
    return ops.backend(weight.device) == "cpp" and multiplies


def _can_be_planned(net: UNet2D) -> bool:
    """Whether there are C++ kernels for a network: it has no option that programs lack."""
    options = net.config
    return (
        has_programs(net.conv_in.weight)
        and all(resnet.act in FUSED for resnet in net.resnets)
        and not options["center_input_sample"]
        and all(isinstance(m.phases, Conv2d) for m in net.modules() if isinstance(m, Upsample))
        and all(
            resnet.conv_shortcut is not None
            for block in cast("Iterable[Block]", net.up_blocks)
            for resnet, _ in block.layers()
        )
    )


class PlannedUNet:
    """`denoise` of a copy of a network for inference, as a program.

    Args: net: the copy; builder: builds its programs.
    """

    def __init__(self, net: UNet2D | FusedUNet1D, builder: Callable[..., Any] | None = None):
        self.net = net
        self._build: Callable[..., Any] = builder or Builder
        self._programs: dict[tuple[int, ...], Program] = {}
        self._packed: dict[tuple[int, bool], Weights] = {}
        self._version = net.version
        self._lock = Lock()  # several threads may evaluate the network

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """Evaluate the network. Args and returns: see `UNet2D.denoise`."""
        self.net.check_shape(x)
        x, rows = layout.channels_last(x), rows.contiguous()
        y = layout.empty(len(x), (self.net.out_channels, *x.shape[2:]), dtype=x.dtype, device=x.device)
        if not len(x):
            return y
        with self._lock:
            program = self._program(x, rows)
        program.run(x.data_ptr(), rows.data_ptr(), y.data_ptr())
        return y

    def _program(self, x: Tensor, rows: Tensor) -> Program:
        """The program for inputs of these shapes, with the current weights."""
        if self._version != self.net.version:
            self._programs, self._packed, self._version = {}, {}, self.net.version
        key = *x.shape, len(rows)
        if key not in self._programs:
            self._programs[key] = self._build(self.net, x, rows, self._pack).program
            while len(self._programs) > MOST_SHAPES:
                del self._programs[next(iter(self._programs))]
        return self._programs[key]

    def _pack(self, weight: Tensor, winograd: bool) -> Weights:
        """A packed weight, which the programs of all shapes share."""
        key = weight.data_ptr(), winograd
        if key not in self._packed:
            self._packed[key] = pack(weight.detach(), winograd=winograd)
        return self._packed[key]


class Builder:
    """Builds the program of a network for inputs of one shape, by the steps of `UNet2D.denoise`.

    Args: pack: packs a weight for Winograd's method or for the other.
    """

    def __init__(self, net: UNet2D, x: Tensor, rows: Tensor, pack: Pack):
        self.program, self._pack = Program(x.dtype), pack
        self._entry_stride = rows.shape[1] if len(rows) > 1 else 0
        self._column = 0  # of the time rows, for the next residual block
        n, channels, height, width = x.shape
        out = Images(given(Y), n, height, width, net.config["out_channels"])
        h = self._convolution(net.conv_in, Images(given(X), n, height, width, channels))
        skips = [h]
        for block in cast("Iterable[Block]", net.down_blocks):
            for resnet, attention in block.layers():
                h = self._attention(attention, self._resnet(resnet, h))
                skips.append(h)
            for downsample in block.downsamplers:
                h = self._downsample(downsample, h)
                skips.append(h)
        for resnet, attention in () if net.mid_block is None else net.mid_block.layers():
            h = self._attention(attention, self._resnet(resnet, h))
        for block in cast("Iterable[Block]", net.up_blocks):
            for resnet, attention in block.layers():
                h = self._attention(attention, self._resnet(resnet, h, skips.pop()))
            for upsample in block.upsamplers:
                h = self._upsample(upsample, h)
        h = self._norm(net.conv_norm_out, h, act="silu")
        self._convolution(net.conv_out, h, into=out)

    def _resnet(self, resnet: Resnet, x: Images, skip: Images | None = None) -> Images:
        columns = Rows(given(ROWS, 4 * self._column), self._entry_stride)
        self._column += resnet.columns
        act = FUSED[resnet.act]
        h = self._norm(resnet.norm1, x, skip, act=act)
        if resnet.phases is not None:
            h = self._polyphase(resnet.phases, h)
        else:
            h = self.program.resample(h, up=False) if resnet.resize == "down" else h
            h = self._convolution(resnet.conv1, h)
        if resnet.bias1 is None:
            h = self._norm(resnet.norm2, h, add=columns, act=act)
        else:
            bias = Rows(self.program.keep(resnet.bias1))
            h = self._norm(resnet.norm2, h, add=bias, scale_shift=columns, act=act)
        if resnet.conv_shortcut is not None:
            x = self.program.convolution(x, self._pack(resnet.conv_shortcut.weight, False), skip=skip)
        elif resnet.resize is not None:
            x = self.program.resample(x, up=resnet.resize == "up")
        return self._convolution(resnet.conv2, h, resnet.bias, residual=x, scale=resnet.scale)

    def _attention(self, attention: nn.Module, x: Images) -> Images:
        if not isinstance(attention, Attention):  # the identity
            return x
        h = x if attention.group_norm is None else self._norm(attention.group_norm, x, act=None)
        qkv = cast(nn.Linear, attention.qkv)
        h = self.program.convolution(h, self._pack(qkv.weight, False), qkv.bias)
        h = self.program.attention(h, attention.head_dim)
        weights = self._pack(cast(nn.Linear, attention.to_out[0]).weight, False)
        return self.program.convolution(h, weights, attention.bias, residual=x, scale=attention.scale)

    def _downsample(self, downsample: nn.Module, x: Images) -> Images:
        if isinstance(downsample, Resnet):
            return self._resnet(downsample, x)
        if isinstance(downsample, Pool):
            return self.program.resample(x, up=False)
        conv, padding = cast(Downsample, downsample).conv, cast(Downsample, downsample).padding
        half = x.height // 2, x.width // 2  # they are even
        weights = self._pack(conv.weight, False)
        return self.program.convolution(x, weights, conv.bias, stride=2, padding=(padding, padding), size=half)

    def _upsample(self, upsample: nn.Module, x: Images) -> Images:
        if isinstance(upsample, Resnet):
            return self._resnet(upsample, x)
        if isinstance(upsample, Upsample):
            return self._polyphase(cast(Conv2d, upsample.phases), x, upsample.bias)
        return self.program.resample(x, up=True)

    def _polyphase(self, phases: Conv2d, x: Images, bias: Tensor | None = None) -> Images:
        """One convolution by Winograd's method, or one of 2 x 2 for each phase, into every second row and column."""
        size = 2 * x.height, 2 * x.width
        if self._takes_winograd(x):
            return self.program.convolution(x, self._pack(phases.weight, True), bias, size=size)
        y = self.program.images(x.n, *size, phases.out_channels // 4)
        for i, weight in enumerate(phases.weight.chunk(4)):
            row, column = divmod(i, 2)
            weights, padding = self._pack(weight, False), (1 - row, 1 - column)
            self.program.convolution(
                x, weights, bias, padding=padding, into=y, size=(x.height, x.width), phase=(row, column)
            )
        return y

    def _convolution(self, conv: Conv2d, x: Images, bias: Tensor | None = None, **options: Any) -> Images:
        """A 3 x 3 convolution of stride 1. Args: bias: instead of the convolution's own."""
        weights = self._pack(conv.weight, self._takes_winograd(x))
        return self.program.convolution(x, weights, conv.bias if bias is None else bias, padding=(1, 1), **options)

    def _takes_winograd(self, x: Images) -> bool:
        large = x.channels >= LEAST_CHANNELS and min(x.height, x.width) >= LEAST_SIDE
        return large and self.program.dtype == torch.float32

    def _norm(self, norm: GroupNorm, x: Images, skip: Images | None = None, **options: Any) -> Images:
        return self.program.group_norm(x, skip, norm.weight, norm.bias, norm.num_groups, norm.eps, **options)
