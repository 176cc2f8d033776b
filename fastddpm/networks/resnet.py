"""The residual block of a `UNet2D`, which may also halve or double the size of its images."""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.core.layout import channels_last
from fastddpm.networks.layers import (
    ACTIVATIONS,
    Activation,
    Conv2d,
    GroupNorm,
    Linear,
    as_pixels,
    is_unchanged,
    norm_and_activation,
    phases_of,
)


class Resnet(nn.Module):
    """A residual block: two convolutions with norm and activation before each, the time embedding between them.

    Args:
        embed_width: of the time embedding.
        scale_shift: whether the time embedding scales and shifts the second norm's output, or is added to its input.
        scale: the divisor of the sum of the block and its input.
        resize: "down": the mean of 2 x 2 pixels, or "up": nearest neighbours, before the first convolution and on
            the shortcut (Dhariwal and Nichol 2021, arXiv:2105.05233, after BigGAN); None: neither.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        embed_width: int,
        groups: int,
        eps: float,
        act: str,
        scale_shift: bool,
        dropout: float,
        scale: float,
        resize: str | None = None,
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.columns = 2 * c_out if scale_shift else c_out
        self.time_emb_proj = Linear(embed_width, self.columns)
        self.norm2 = GroupNorm(groups, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else None
        self.phases: Conv2d | None = None  # instead of an upsampling and conv1: see `Upsample`
        self.bias1: nn.Parameter | None = None  # of conv1, if it is neither in conv1 nor in the time rows
        self.bias: nn.Parameter | None = None  # of the residual sum, if a kernel adds it
        self.scale_shift, self.scale, self.resize = scale_shift, scale, resize
        self.kernels = False
        self.act: Activation = ACTIVATIONS[act]

    def time_columns(self, embed: Tensor) -> Tensor:
        """The activated time embedding [N, embed_width] -> this block's columns of the time rows [N, self.columns]."""
        if is_unchanged(self.time_emb_proj, nn.Linear) and self.time_emb_proj.bias is not None:
            return F.linear(embed, *self.time_projection())
        columns, bias = self.time_emb_proj(embed), self._bias_of_rows()
        return columns if bias is None else columns + bias

    def time_projection(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of `time_columns`; the biases are added before any rounding."""
        weight, bias, of_conv1 = self.time_emb_proj.weight, self.time_emb_proj.bias, self._bias_of_rows()
        return weight, bias if of_conv1 is None else bias + of_conv1

    def _bias_of_rows(self) -> Tensor | None:
        """The bias of the first convolution, where the columns of the time rows take its place."""
        return None if self.scale_shift or not is_unchanged(self.conv1, Conv2d) else self.conv1.bias

    def fuse(self, kernels: bool, polyphase: bool) -> None:
        """Let the network project the time for all blocks at once.

        Args: kernels: whether a kernel adds the biases; polyphase: whether to convolve before pixels are repeated.
        """
        del self.time_emb_proj
        self.kernels = kernels
        c_in, c_out = self.conv1.in_channels, self.conv1.out_channels
        if polyphase and self.resize == "up":
            self.phases = Conv2d(c_in, 4 * c_out, 2, padding=1, bias=False)
        if self.scale_shift and (kernels or self.phases is not None):
            self.bias1 = nn.Parameter(torch.empty_like(cast(Tensor, self.conv1.bias)))
        if self.phases is not None:
            del self.conv1
        elif self.bias1 is not None or not self.scale_shift:
            self.conv1.bias = None
        if kernels:
            self.bias = nn.Parameter(torch.empty_like(cast(Tensor, self.conv2.bias)))
            self.conv2.bias = None
            if self.conv_shortcut is not None:
                self.conv_shortcut.bias = None

    def fused_parameters(self) -> Iterator[tuple[str, Tensor]]:
        bias = cast(Tensor, self.conv2.bias)
        yield "bias", bias if self.conv_shortcut is None else bias + cast(Tensor, self.conv_shortcut.bias)
        yield "bias1", cast(Tensor, self.conv1.bias)
        if self.resize == "up":
            yield "phases.weight", phases_of(self.conv1.weight)

    def forward(self, x: Tensor, columns: Tensor, skip: Tensor | None = None) -> Tensor:
        """Args: columns: [1 or N, self.columns] of the time rows; skip: channels that follow those of x."""
        if skip is not None and not self.kernels:
            x, skip = torch.cat([x, skip], 1), None
        h = norm_and_activation(self.norm1, x, self.act, skip)
        bias = columns if not self.scale_shift else None if self.bias1 is None else self.bias1[None]
        if self.kernels:
            scale_shift = columns if self.scale_shift else None
            h = self.norm2(self._first_convolution(h, None), self.act, add=bias, scale_shift=scale_shift)
        elif self.scale_shift:
            scale, shift = columns.to(h.dtype)[:, :, None, None].chunk(2, 1)
            h = self.act(self.norm2(self._first_convolution(h, bias)) * (1 + scale) + shift)
        else:
            h = norm_and_activation(self.norm2, self._first_convolution(h, bias), self.act)
        h, x = self.conv2(self.dropout(h)), self._resampled(x)
        if self.kernels:
            h = ops.residual(h, self._shortcut(x, skip), self.bias)
        else:
            shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
            h = h.add_(shortcut) if is_unchanged(self.conv2, Conv2d) else h + shortcut  # others may keep their output
        return h if self.scale == 1 else h / self.scale

    def _first_convolution(self, h: Tensor, bias: Tensor | None) -> Tensor:
        """Args: bias: [1 or N, c_out]; None: that of the convolution, if it has one."""
        if self.phases is not None:
            h = ops.interleave(channels_last(self.phases(h)))
        elif bias is not None and is_unchanged(self.conv1, Conv2d):
            return self.conv1(self._resampled(h), bias)
        else:
            h = self.conv1(self._resampled(h))
        return h if bias is None else h + bias.to(h.dtype)[:, :, None, None]

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resize is None:
            return x
        y = F.avg_pool2d(x, 2) if self.resize == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
        return channels_last(y) if self.kernels else y

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """The input, projected if widths differ: x and skip by a matrix product each, without concatenating them."""
        if self.conv_shortcut is None:
            return x if skip is None else torch.cat([x, skip], 1)
        inputs = [x] if skip is None else [x, skip]
        weights = self.conv_shortcut.weight.flatten(1).split([part.shape[1] for part in inputs], 1)
        y = F.linear(as_pixels(x), weights[0])
        if skip is not None:
            y.addmm_(as_pixels(skip), weights[1].t())
        return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
