"""A fused `UNet1D` on a CPU as a program of C++ kernels, like a `UNet2D`: see `networks.planned`."""

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from fastddpm.core.layout import channels_last
from fastddpm.kernels.cpu.program import (  # type: ignore[import-not-found]  # noqa: TID253 (it needs no Triton)
    Images,
    Program,
    Rows,
    given,
    pack,
)
from fastddpm.networks.fused_unet1d import FusedBlock, FusedUNet1D
from fastddpm.networks.layers import Conv2d, phases_of_transposed
from fastddpm.networks.planned import ROWS, Pack, X, Y


class SequenceBuilder:
    """Builds the program of a network for inputs of one shape, by the steps of `FusedUNet1D.denoise`.

    Args: pack: packs a weight; the second argument, for Winograd's method, is always False here.
    """

    def __init__(self, net: FusedUNet1D, x: Tensor, rows: Tensor, pack: Pack):
        self.program, self._pack = Program(x.dtype), pack
        self._entry_stride = rows.shape[1] if len(rows) > 1 else 0
        self._scales = net.config["cond_predict_scale"]
        self._column = 0  # of the rows, for the next residual block
        n, channels, length = x.shape
        frame = net.config["frame"]
        h = Images(given(X), n, 1, length // frame, frame * channels)
        out = Images(given(Y), n, 1, length // frame, frame * channels)
        skips = []
        for i, block in enumerate(cast("Iterable[FusedBlock]", net.down)):
            h = self._block(block, h)
            if i % 2:
                skips.append(h)
                h = self._downsample(cast(Conv2d, net.downsamplers[i // 2]), h) if i // 2 < len(net.up) // 2 else h
        for block in cast("Iterable[FusedBlock]", net.mid):
            h = self._block(block, h)
        for i, block in enumerate(cast("Iterable[FusedBlock]", net.up)):
            h = self._block(block, h) if i % 2 else self._block(block, h, skips.pop())
            h = self._upsample(cast(nn.ConvTranspose2d, net.upsamplers[i // 2]), h) if i % 2 else h
        h = self._block(net.final, h)
        self.program.convolution(h, self._pack(net.out.weight, False), net.out.bias, into=out)

    def _block(self, block: FusedBlock, x: Images, skip: Images | None = None) -> Images:
        film, residual = None, None
        if block.columns:
            film, residual = Rows(given(ROWS, 4 * self._column), self._entry_stride), x
            self._column += block.columns
        if block.shortcut is not None:
            residual = self.program.convolution(
                x, self._pack(block.shortcut.weight, False), block.shortcut.bias, skip=skip
            )
        h, last = x, len(block.convs) - 1
        for i, (conv, norm, bias) in enumerate(zip(block.convs, block.norms, block.biases, strict=True)):
            weight = cast(Tensor, conv.weight)
            of_first = skip if i == 0 else None
            h = self.program.convolution(
                h, self._pack(weight, False), bias[0], skip=of_first, padding=(0, weight.shape[3] // 2)
            )
            of_norm = cast(Any, norm)
            h = self.program.group_norm(
                h,
                None,
                *(of_norm.weight, of_norm.bias, of_norm.num_groups, of_norm.eps),
                act="mish",
                film=film if i < last else None,
                film_scales=self._scales,
                residual=residual if i == last else None,
            )
        return h

    def _downsample(self, conv: Conv2d, x: Images) -> Images:
        weights, size = self._pack(conv.weight, False), (1, -(-x.width // 2))
        return self.program.convolution(x, weights, conv.bias, stride=2, padding=(0, 1), size=size)

    def _upsample(self, conv: nn.ConvTranspose2d, x: Images) -> Images:
        y = self.program.images(x.n, 1, 2 * x.width, conv.out_channels)
        for i, weight in enumerate(phases_of_transposed(conv.weight[:, :, 0])):
            weights = pack(channels_last(weight))  # not by `self._pack`, which knows weights by their address
            self.program.convolution(x, weights, conv.bias, padding=(0, 1 - i), into=y, size=(1, x.width), phase=(0, i))
        return y
