"""Programs: calls of C++ kernels that are recorded once, with their buffers, and replayed as often as wanted.

This is to a CPU what a captured CUDA graph is to a GPU. A replay allocates nothing, and its threads are started once.
"""

from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from .native import native

ALIGNMENT = 64  # bytes: a cache line
CHUNK = 16  # of gemm.h
_GIVEN = 0x7FFF << 48  # of module.cpp: marks a pointer that is given to each replay
_ACTIVATIONS = {None: 0, "silu": 1, "mish": 2}  # of activation.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # of floats.h
_ARENA = 0  # of these pointers: the memory of all buffers


def given(which: int, offset: int = 0) -> int:
    """The word for a pointer plus an offset in bytes: 0 is the arena, 1 the first pointer that `run` is given."""
    return _GIVEN | which << 40 | offset


class Images(NamedTuple):
    """Activations in memory: [n, height, width, channels] of a program's dtype, at a pointer (a word)."""

    at: "Buffer | int"
    n: int
    height: int
    width: int
    channels: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> int:
        return self.n * self.pixels * self.channels


class Rows(NamedTuple):
    """A row of fp32 for each entry, at a pointer (a word), `stride` elements apart; 0: one row for all."""

    at: int
    stride: int = 0


class Buffer:
    """Memory of a program's arena, free again when nothing refers to it."""

    def __init__(self, program: "Program", size: int):
        self._program, self._size = program, -(-size // ALIGNMENT) * ALIGNMENT
        self._offset = program._take(self._size)

    def __int__(self) -> int:
        return given(_ARENA, self._offset)

    def __del__(self) -> None:
        self._program._give_back(self._offset, self._size)


class Program:
    """A sequence of calls under construction, and then ready to run.

    Args: dtype: of the activations and packed weights, float32 or bfloat16.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._calls: list[tuple[str, bytes]] = []  # (kernel, code)
        self._code = b""
        self._kept: list[Tensor] = []
        self._free = [(0, 1 << 40)]  # (offset, size) of the arena, ascending
        self.memory = 0  # bytes of the arena
        self._arenas: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._calls)

    def run(self, *pointers: int) -> None:
        """Run the calls. Args: pointers: those that `given` stands for."""
        if not self._code:
            self._code = b"".join(code for _, code in self._calls)
        with self._arena() as arena:
            native().module.replay(torch.get_num_threads(), self._code, arena, *pointers)  # type: ignore[union-attr]

    def seconds(self, *pointers: int) -> list[tuple[str, float]]:
        """Run the calls one by one, which takes longer. Returns: (kernel, seconds) of each."""
        found = []
        with self._arena() as arena:
            for kernel, code in self._calls:
                began = perf_counter()
                native().module.replay(torch.get_num_threads(), code, arena, *pointers)  # type: ignore[union-attr]
                found.append((kernel, perf_counter() - began))
        return found

    @contextmanager
    def _arena(self) -> Iterator[int]:
        """Memory for one run, of which several threads may need one each. Yields: where its first cache line begins."""
        try:
            arena = self._arenas.pop()
        except IndexError:
            arena = torch.empty(self.memory + ALIGNMENT, dtype=torch.uint8, device="cpu")
        yield -(-arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        self._arenas.append(arena)

    def images(self, n: int, height: int, width: int, channels: int) -> Images:
        """New memory for activations."""
        return Images(Buffer(self, self.dtype.itemsize * n * height * width * channels), n, height, width, channels)

    def group_norm(
        self,
        x: Images,
        skip: Images | None,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        *,
        add: Rows | None = None,
        scale_shift: Rows | None = None,
        act: str | None,
        film: Rows | None = None,
        film_scales: bool = True,
        residual: Images | None = None,
    ) -> Images:
        """`ops.group_norm`.

        Args:
            add: rows of [channels]; scale_shift: rows of [2, channels].
            film: rows of [2, channels], or of [channels] without `film_scales`.
        """
        n, height, width, channels = x.n, x.height, x.width, x.channels + (skip.channels if skip else 0)
        y, blocks = self.images(n, height, width, channels), -(-x.pixels // 64)
        moments, transform = Buffer(self, n * blocks * 2 * channels * 8), Buffer(self, n * 3 * channels * 4)
        self._call(
            "group_norm", y.size, n, x.pixels, groups, x.channels, channels - x.channels,
            y.at, x.at, skip.at if skip else 0, *(add or (0, 0)), *(scale_shift or (0, 0)), self.keep(weight),
            self.keep(bias), float(eps),
            _ACTIVATIONS[act], *(film or (0, 0)), film_scales, residual.at if residual else 0, _DTYPES[self.dtype],
            moments, transform,
        )  # fmt: skip
        return y

    def convolution(
        self,
        x: Images,
        weights: "Weights",
        bias: Tensor | None = None,
        *,
        skip: Images | None = None,
        residual: Images | None = None,
        scale: float = 1.0,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        size: tuple[int, int] | None = None,
        into: Images | None = None,
        phase: tuple[int, int] | None = None,
    ) -> Images:
        """((conv2d of x and the skip that follows its channels, + bias) + residual) / scale.

        Args:
            weights: packed from an upsampling's phases for Winograd's method, they need a size twice that of x, and
                take no padding.
            padding: above and on the left; what is missing on the other sides is zero as well.
            size: height and width of the result; None: those of x.
            into: where to write the result; None: new memory.
            phase: write only every second row and column of `into`, from this one on; an image of height 1 has only
                row 0.
        """
        height, width = size or (x.height, x.width)
        y = into or self.images(x.n, height, width, weights.channels)
        channels, step = y.channels, 2 if phase else 1
        offset = self.dtype.itemsize * channels * (phase[0] * y.width + phase[1]) if phase else 0
        strides = y.pixels * channels, step * y.width * channels, step * channels
        inputs = x.channels, skip.channels if skip else 0
        work = x.n * height * width * channels * (1 + weights.taps * sum(inputs) // 128)
        inputs_at = x.at, skip.at if skip else 0
        parameters = self.keep(weights.packed), 0 if bias is None else self.keep(bias.float())
        self._call(
            "convolution", work, _DTYPES[self.dtype], weights.winograd, x.n, x.height, x.width, *inputs, height, width,
            channels, *weights.kernel, stride, *padding, *inputs_at, *parameters, residual.at if residual else 0,
            int(y.at) + offset, *strides, float(scale),
        )  # fmt: skip
        return y

    def resample(self, x: Images, *, up: bool) -> Images:
        """Twice as many rows and columns, by nearest neighbours; or half as many, by the mean of 2 x 2 pixels."""
        size = (2 * x.height, 2 * x.width) if up else (x.height // 2, x.width // 2)
        y = self.images(x.n, *size, x.channels)
        work = max(x.size, y.size)
        self._call("resample", work, x.n, x.height, x.width, x.channels, up, y.at, x.at, _DTYPES[self.dtype])
        return y

    def attention(self, qkv: Images, head_dim: int) -> Images:
        """Self-attention. Args: qkv: queries, keys and values, one after the other in the channels."""
        y = self.images(qkv.n, qkv.height, qkv.width, qkv.channels // 3)
        tokens, heads, columns = qkv.pixels, y.channels // head_dim, native().module.columns()  # type: ignore[union-attr]
        widest = max(-(-head_dim // CHUNK) * CHUNK, -(-head_dim // columns) * columns)
        packed = Buffer(self, 4 * qkv.n * heads * 2 * -(-tokens // 32) * 32 * widest)
        self._call(
            "attention",
            y.size * tokens // 32,
            _DTYPES[self.dtype],
            qkv.n,
            tokens,
            heads,
            head_dim,
            y.at,
            qkv.at,
            packed,
        )
        return y

    def _call(self, name: str, work: int, *words: "int | float | Buffer") -> None:
        numbers = (int(word) if isinstance(word, Buffer) else word for word in words)
        self._calls.append((name, native().module.record(name, work, *numbers)))  # type: ignore[union-attr]

    def keep(self, tensor: Tensor) -> int:
        """The pointer to a tensor, which the program keeps."""
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _take(self, size: int) -> int:
        """The offset of free memory, the lowest that is large enough."""
        i, (offset, length) = next(item for item in enumerate(self._free) if item[1][1] >= size)
        self._free[i : i + 1] = [(offset + size, length - size)] * (length > size)
        self.memory = max(self.memory, offset + size)
        return offset

    def _give_back(self, offset: int, size: int) -> None:
        insort(self._free, (offset, size))
        merged: list[tuple[int, int]] = []
        for start, length in self._free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = merged[-1][0], merged[-1][1] + length
            else:
                merged.append((start, length))
        self._free = merged


class Weights(NamedTuple):
    """Packed weights of a convolution with so many output channels, and a kernel of so many rows and columns.

    With Winograd's method, a kernel of 2 x 2 stands for the four phases of an upsampling.
    """

    packed: Tensor
    channels: int
    kernel: tuple[int, int]
    winograd: bool

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


def pack(weight: Tensor, *, winograd: bool = False) -> Weights:
    """Pack weights for `Program.convolution`.

    Args:
        weight: [out_channels, channels, height, width] fp32 or bf16, channels-last; or [out_channels, channels].
        winograd: for Winograd's method, which takes kernels of 3 x 3 with stride 1 and padding 1, or the four phases of
            an upsampling, [4 * out_channels, channels, 2, 2], as in `networks.layers.Upsample`.
    """
    module, (out_channels, channels), (height, width) = native().module, weight.shape[:2], weight.shape[2:] or (1, 1)
    if winograd and width == 2:
        out_channels //= 4
    assert module is not None
    assert weight.movedim(1, -1).is_contiguous()
    depth = channels if winograd else channels * height * width
    words = -(-depth * weight.itemsize // 4)
    panels, padded = -(-out_channels // module.columns()), -(-words // CHUNK) * CHUNK
    size = panels * ((width + 1) ** 2 if winograd else 1) * padded * module.columns()
    packed = torch.empty(size, dtype=torch.float32, device="cpu")
    shape, pointers = (out_channels, channels, height, width), (packed.data_ptr(), weight.data_ptr())
    module.pack(torch.get_num_threads(), 1 << 40, _DTYPES[weight.dtype], winograd, *shape, *pointers)
    return Weights(packed, out_channels, (height, width), winograd)
