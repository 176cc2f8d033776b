"""Programs of C++ kernels: convolutions, attention and norms against float64; equal bits for any batch and threads."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.core import layout
from fastddpm.kernels.cpu.native import native
from fastddpm.kernels.cpu.program import Images, Program, Rows, Weights, given, pack
from fastddpm.networks.layers import Upsample, phases_of_transposed
from tests.kernels.cpu.conftest import BFLOAT16, INSTRUCTION_SETS
from tests.support.check import assert_as_accurate, at_once
from tests.support.draws import generator

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the C++ kernels have not been built")


def normal(*shape, seed=0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def images(*shape, seed=0) -> Tensor:
    return layout.channels_last(normal(*shape, seed=seed))


def described(which: int, x: Tensor) -> Images:
    """x as what a program is given as its which-th pointer."""
    n, channels, height, width = x.shape
    return Images(given(which), n, height, width, channels)


@pytest.fixture
def threads():
    """Sets torch's number of threads; restores it at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Convolution:
    """A convolution of random tensors.

    Args:
        shape: of x; kernel: its side, or its height and width; skip: channels of a second input; padding: on all sides,
            or above and on the left; below: below and on the right, if it differs; phase: see `Program.convolution`;
            doubled: whether nearest neighbours double the size of x.
    """

    def __init__(
        self, shape, out, kernel, *, skip=0, stride=1, padding=0, below=None, residual=False, bias=True, scale=1.0,
        phase=None, winograd=False, doubled=False, dtype=torch.float32,
    ):  # fmt: skip
        self.x, self.dtype = images(*shape).to(dtype), dtype
        self.skip = images(shape[0], skip, *shape[2:], seed=1).to(dtype) if skip else None
        kernel, padding = (of if isinstance(of, tuple) else (of, of) for of in (kernel, padding))
        weight = normal(out, shape[1] + skip, *kernel, seed=2) / ((shape[1] + skip) * math.prod(kernel)) ** 0.5
        self.weight = layout.channels_last(weight.to(dtype))
        self.bias = normal(out, seed=3) if bias else None
        self.stride, self.padding, self.below = stride, padding, padding if below is None else (below, below)
        self.scale, self.phase, self.winograd, self.doubled = scale, phase, winograd, doubled
        self.size = self.plain(torch.float32, residual=False).shape
        self.residual = images(*self.size, seed=4).to(dtype) if residual else None

    def plain(self, dtype, residual=True) -> Tensor:
        """torch's result in a dtype."""
        x = torch.cat([self.x, *([] if self.skip is None else [self.skip])], 1).to(dtype)
        if self.doubled:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.pad(x, (self.padding[1], self.below[1], self.padding[0], self.below[0]))
        y = F.conv2d(x, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype), self.stride)
        return (y + self.residual.to(dtype) if residual and self.residual is not None else y) / self.scale

    def packed(self) -> Weights:
        if not self.doubled:
            return pack(self.weight, winograd=self.winograd)
        upsample = Upsample(len(self.weight))
        upsample.conv.weight = nn.Parameter(self.weight)
        return pack(layout.channels_last(dict(upsample.fused_parameters())["phases.weight"].detach()), winograd=True)

    def run(self) -> Tensor:
        program, step = Program(self.dtype), 2 if self.phase else 1
        n, channels, height, width = self.size
        out = torch.full((n, height * step, width * step, channels), math.nan, dtype=self.dtype).movedim(-1, 1)
        given_tensors = [self.x, self.skip, self.residual, out]
        x, skip, residual, into = (None if t is None else described(k, t) for k, t in enumerate(given_tensors, 1))
        program.convolution(
            x, self.packed(), self.bias, skip=skip, residual=residual, scale=self.scale,
            stride=self.stride, padding=self.padding, size=(height, width), into=into,
            phase=self.phase,
        )  # fmt: skip
        program.run(*(0 if t is None else t.data_ptr() for t in given_tensors))
        if not self.phase:
            return out
        row, column = self.phase
        got = out[:, :, row::2, column::2].clone()
        out[:, :, row::2, column::2] = math.nan
        assert out.isnan().all()  # nothing else was written
        return got


WINOGRAD = {
    "four tiles": ((3, 40, 4, 4), 24),
    "odd sides": ((2, 20, 7, 5), 33),
    "narrow": ((3, 17, 9, 12), 1),
    "wide": ((1, 48, 16, 16), 96),
    "many tiles": ((2, 32, 40, 38), 40),
    "many tiles and panels": ((1, 32, 24, 26), 200),
    "deep tiles": ((1, 272, 4, 4), 8),
}
DOUBLED = {"one pixel": ((2, 16, 1, 1), 16), "odd": ((3, 40, 5, 7), 40), "many": ((1, 33, 18, 16), 33)}
GATHERED = {
    "pointwise": ((2, 40, 5, 6), 70, 1, {}),
    "linear": ((1, 64, 1, 9), 192, 1, {}),
    "two inputs": ((2, 24, 6, 4), 40, 1, {"skip": 21}),
    "3 x 3": ((1, 3, 8, 8), 32, 3, {"padding": 1}),
    "3 x 3 of two inputs": ((2, 7, 5, 6), 9, 3, {"skip": 4, "padding": 1}),
    "stride 2": ((2, 20, 8, 6), 24, 3, {"stride": 2, "padding": 1}),
    "stride 2, padded below": ((2, 20, 8, 6), 24, 3, {"stride": 2, "below": 1}),
    "phase 0 0": ((2, 20, 5, 4), 24, 2, {"padding": 1, "below": 0, "phase": (0, 0)}),
    "phase 1 1": ((2, 20, 5, 4), 24, 2, {"padding": 0, "below": 1, "phase": (1, 1)}),
    "deep": ((1, 300, 4, 4), 40, 3, {"padding": 1}),
    "3 x 5": ((2, 7, 5, 6), 9, (3, 5), {"padding": (1, 2)}),
    "1 x 3": ((2, 20, 1, 16), 33, (1, 3), {"padding": (0, 1)}),
    "1 x 5": ((2, 300, 1, 7), 40, (1, 5), {"padding": (0, 2)}),
    "1 x 5 of two inputs": ((2, 40, 1, 4), 40, (1, 5), {"skip": 24, "padding": (0, 2)}),
    "1 x 5 of few pixels": ((1, 24, 1, 2), 300, (1, 5), {"padding": (0, 2)}),
    "1 x 3, stride 2": ((2, 20, 1, 16), 24, (1, 3), {"stride": 2, "padding": (0, 1)}),
    "5 x 1, stride 2": ((1, 20, 9, 2), 24, (5, 1), {"stride": 2, "padding": (2, 0)}),
}
PRECISIONS = torch.float32, torch.float64
END = [{}, {"bias": False}, {"residual": True}, {"residual": True, "scale": 3.0}]  # what follows the convolution
ALL = {
    name: Convolution(*of, 3, padding=1, winograd=True, **END[i % 4]) for i, (name, of) in enumerate(WINOGRAD.items())
}
ALL |= {
    f"doubled, {name}": Convolution(*of, 3, padding=1, winograd=True, doubled=True, **END[i % 4])
    for i, (name, of) in enumerate(DOUBLED.items())
}
ALL |= {name: Convolution(*of, **options, **END[i % 4 if "phase" not in options else i % 2])
        for i, (name, (*of, options)) in enumerate(GATHERED.items())}  # fmt: skip


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", ALL)
def test_convolution_is_as_accurate_as_torch(name, isa, use):
    with use(isa):
        got = ALL[name].run()
    assert_as_accurate(got, ALL[name].plain(torch.float32), ALL[name].plain(torch.float64))


@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_transposed_convolution_is_as_accurate_as_torch(isa, length, use):
    """By one convolution for each phase, into every second position."""
    x, weight, bias = normal(2, 40, length), normal(40, 24, 4, seed=1) / 9, normal(24, seed=2)
    images_of_x = layout.channels_last(x[:, :, None])
    y = layout.channels_last(torch.full((2, 24, 1, 2 * length), math.nan))
    with use(isa):
        program = Program()
        for phase, part in enumerate(phases_of_transposed(weight)):
            program.convolution(
                described(1, images_of_x), pack(layout.channels_last(part)), bias,
                padding=(0, 1 - phase), size=(1, length), into=described(2, y), phase=(0, phase),
            )  # fmt: skip
        program.run(images_of_x.data_ptr(), y.data_ptr())
    plain, ref = (F.conv_transpose1d(*(t.to(dtype) for t in (x, weight, bias)), 2, 1) for dtype in PRECISIONS)
    assert_as_accurate(y[:, :, 0], plain, ref)


@pytest.mark.parametrize("isa", BFLOAT16)
@pytest.mark.parametrize("name", GATHERED)
def test_convolution_in_bf16_is_as_accurate_as_torch(name, isa, use, threads):
    *of, options = GATHERED[name]
    conv = Convolution(*of, **options, residual="phase" not in options, dtype=torch.bfloat16)
    with use(isa):
        got = conv.run()
        threads(3)
        assert torch.equal(conv.run(), got)
    assert_as_accurate(got, conv.plain(torch.bfloat16), conv.plain(torch.float64))


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 16, 2, 2), (2, 5, 1, 3), (3, 17, 5, 2)], ids=str)
def test_winograd_is_exact_for_small_whole_numbers(shape, doubled):
    conv = Convolution(shape, shape[1], 3, padding=1, winograd=True, doubled=doubled)
    for tensor in (conv.x, conv.weight, conv.bias):
        tensor.copy_(torch.randint(-9, 10, tensor.shape, generator=generator(5)))
    assert torch.equal(conv.run().double(), conv.plain(torch.float64))


@pytest.mark.parametrize("end", END[1:], ids=str)
@pytest.mark.parametrize("method", ["winograd", "gathered"])
def test_whatever_follows_a_convolution_is_as_accurate_as_torch(method, end):
    conv = Convolution((2, 20, 7, 5), 33, 3, padding=1, winograd=method == "winograd", **end)
    assert_as_accurate(conv.run(), conv.plain(torch.float32), conv.plain(torch.float64))


@pytest.mark.parametrize("name", ALL)
def test_bits_of_a_convolution_depend_on_neither_batch_nor_threads(name, threads):
    conv = ALL[name]
    want = conv.run()
    for count in (1, 3, 7):
        threads(count)
        assert torch.equal(conv.run(), want)
    if len(conv.x) > 1:
        parts = [vars(conv)[key] for key in ("x", "skip", "residual")]
        conv.x, conv.skip, conv.residual = (None if t is None else layout.channels_last(t[1:2]) for t in parts)
        before, conv.size = conv.size, (1, *conv.size[1:])
        assert torch.equal(conv.run(), want[1:2])
        conv.x, conv.skip, conv.residual = parts
        conv.size = before


@pytest.mark.parametrize("method", ["winograd", "gathered"])
def test_nan_and_inf_reach_only_the_outputs_around_them(method):
    conv = Convolution((1, 16, 9, 9), 4, 3, padding=1, winograd=method == "winograd")
    conv.x[0, 3, 4, 4] = math.inf
    assert not conv.run()[:, :, 4, 4].isfinite().any()
    reached = (~conv.run().isfinite()).any(1)[0].nonzero()
    margin = 2 if method == "winograd" else 1  # a tile of Winograd's method has four outputs
    assert (reached - 4).abs().max() <= margin


SHAPES = {  # n, height, width, heads, head_dim
    "one head": (2, 4, 4, 1, 32),
    "one token": (1, 1, 1, 2, 8),
    "heads of 8": (1, 8, 8, 4, 8),
    "odd": (2, 5, 7, 3, 20),
    "many tokens": (1, 20, 13, 1, 40),
    "more keys than one panel": (1, 16, 16, 2, 64),
}


def attention_of(qkv: Tensor, head_dim: int) -> Tensor:
    program = Program(qkv.dtype)
    n, channels, height, width = qkv.shape
    y = torch.full((n, height, width, channels // 3), math.nan, dtype=qkv.dtype)
    got = program.attention(described(1, qkv), head_dim)
    identity = layout.channels_last(torch.eye(channels // 3, dtype=qkv.dtype)[..., None, None])
    program.convolution(got, pack(identity), into=described(2, y.movedim(-1, 1)))
    program.run(qkv.data_ptr(), y.data_ptr())
    return y.movedim(-1, 1)


def plain_attention(qkv: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    n, channels, height, width = qkv.shape
    parts = qkv.to(dtype).flatten(2).mT.chunk(3, -1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts)
    y = torch.softmax(q @ k.mT / math.sqrt(head_dim), -1) @ v
    return y.transpose(1, 2).reshape(n, height, width, channels // 3).movedim(-1, 1)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_as_accurate_as_torch(name, spread, isa, use):
    n, height, width, heads, dim = SHAPES[name]
    qkv = images(n, 3 * heads * dim, height, width) * spread
    with use(isa):
        got = attention_of(qkv, dim)
    assert_as_accurate(got, plain_attention(qkv, dim, torch.float32), plain_attention(qkv, dim, torch.float64))


@pytest.mark.parametrize("isa", BFLOAT16)
@pytest.mark.parametrize("name", SHAPES)
def test_attention_in_bf16_is_as_accurate_as_torch(name, isa, use):
    n, height, width, heads, dim = SHAPES[name]
    qkv = images(n, 3 * heads * dim, height, width).bfloat16()
    with use(isa):
        got = attention_of(qkv, dim)
    assert_as_accurate(got, plain_attention(qkv, dim, torch.bfloat16), plain_attention(qkv, dim, torch.float64))


@pytest.mark.parametrize("name", SHAPES)
def test_bits_of_attention_depend_on_neither_batch_nor_threads(name, threads):
    n, height, width, heads, dim = SHAPES[name]
    qkv = images(n, 3 * heads * dim, height, width)
    want = attention_of(qkv, dim)
    for count in (1, 3, 7):
        threads(count)
        assert torch.equal(attention_of(qkv, dim), want)
    assert torch.equal(attention_of(layout.channels_last(qkv[-1:]), dim), want[-1:])


@pytest.mark.parametrize("scaled", [0, 1, 2])
@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("skip", [0, 10])
def test_norm_of_a_program_is_the_operation(skip, rows, scaled):
    x, second = images(2, 22, 9, 9), images(2, skip, 9, 9, seed=1) if skip else None
    channels = 22 + skip
    weight, bias, add = normal(channels, seed=2), normal(channels, seed=3), normal(max(rows, 1), channels, seed=4)
    scale_shift = normal(max(scaled, 1), 2 * channels, seed=5)
    options = {"eps": 1e-5, "act": "silu", "add": add if rows else None, "scale_shift": scale_shift if scaled else None}
    want = ops.group_norm(x, weight, bias, 2, skip=second, **options)
    program, y = Program(), torch.full(want.shape, math.nan).movedim(1, -1).contiguous().movedim(-1, 1)
    got = program.group_norm(
        described(1, x), described(2, second) if skip else None, weight, bias, 2, 1e-5,
        add=Rows(given(3), channels * (rows > 1)) if rows else None,
        scale_shift=Rows(given(5), 2 * channels * (scaled > 1)) if scaled else None, act="silu",
    )  # fmt: skip
    program.convolution(got, pack(layout.channels_last(torch.eye(channels)[..., None, None])), into=described(4, y))
    program.run(x.data_ptr(), second.data_ptr() if skip else 0, add.data_ptr(), y.data_ptr(), scale_shift.data_ptr())
    assert torch.equal(y, want)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_of_a_program_ends_with_film_and_residual(with_residual, parts, rows):
    x, residual = images(2, 40, 1, 9), images(2, 40, 1, 9, seed=1)
    weight, bias, film = normal(40, seed=2), normal(40, seed=3), normal(rows, parts * 40, seed=4)
    other = residual if with_residual else None
    want = ops.group_norm(x, weight, bias, 4, eps=1e-5, act="mish", film=film, residual=other)
    program, y = Program(), layout.channels_last(torch.full(want.shape, math.nan))
    got = program.group_norm(
        described(1, x), None, weight, bias, 4, 1e-5, act="mish", film=Rows(given(2), parts * 40 * (rows > 1)),
        film_scales=parts == 2, residual=described(3, residual) if with_residual else None,
    )  # fmt: skip
    program.convolution(got, pack(layout.channels_last(torch.eye(40)[..., None, None])), into=described(4, y))
    program.run(x.data_ptr(), film.data_ptr(), residual.data_ptr(), y.data_ptr())
    assert torch.equal(y, want)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 7, 6, 4), (3, 40, 4, 10)], ids=str)
def test_resampling_has_the_bits_of_torch(shape, up, dtype, isa, use):
    x, (n, channels, height, width) = images(*shape).to(dtype), shape
    want = F.interpolate(x, scale_factor=2.0, mode="nearest") if up else F.avg_pool2d(x, 2)
    for count in (1, 3):
        y = layout.channels_last(torch.full_like(want, math.nan))
        with use(isa):
            pointers = y.data_ptr(), x.data_ptr(), {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
            native().module.resample(count, 1 << 40, n, height, width, channels, up, *pointers)
        assert torch.equal(y, want)


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_a_program_resamples(up):
    x, program = images(2, 32, 4, 6), Program()
    want = F.interpolate(x, scale_factor=2.0, mode="nearest") if up else F.avg_pool2d(x, 2)
    y = layout.channels_last(torch.full_like(want, math.nan))
    one = pack(layout.channels_last(torch.eye(32)[..., None, None]))
    program.convolution(program.resample(described(1, x), up=up), one, into=described(2, y))
    program.run(x.data_ptr(), y.data_ptr())
    assert torch.equal(y, want)


def doubling(steps: int) -> Program:
    """A program of many calls, each of which doubles the values of the last."""
    program = Program()
    h, double = Images(given(1), 1, 4, 4, 32), pack(layout.channels_last(2 * torch.eye(32)[..., None, None]))
    for _ in range(steps):
        h = program.convolution(h, double)
    program.convolution(h, double, into=Images(given(2), 1, 4, 4, 32))
    return program


def test_memory_is_reused_as_soon_as_nothing_needs_it():
    program, x, y = doubling(20), images(1, 32, 4, 4), images(1, 32, 4, 4, seed=1)
    program.run(x.data_ptr(), y.data_ptr())
    assert len(program) == 21
    assert torch.equal(y, x * 2**21)
    assert program.memory == 2 * x.nbytes


def test_memory_of_buffers_that_are_needed_is_not_reused():
    program = Program()
    kept = [program.images(1, 1, 1, size) for size in (100, 3, 50, 1)]
    offsets = [int(image.at) for image in kept]
    freed = kept.pop(1)
    del freed
    assert int(program.images(1, 1, 1, 16).at) == offsets[1]
    assert int(program.images(1, 1, 1, 17).at) > offsets[3]
    del kept
    assert int(program.images(1, 1, 1, 120).at) == offsets[0]  # the memory of free neighbours is one block


def test_threads_may_run_one_program_at_once():
    program, inputs = doubling(8), [images(1, 32, 4, 4, seed=seed) for seed in range(4)]

    def run(x):
        y = torch.empty_like(x)
        program.run(x.data_ptr(), y.data_ptr())
        return y

    for x, results in zip(inputs, at_once(*(lambda x=x: run(x) for x in inputs), times=20), strict=True):
        assert all(torch.equal(y, x * 2**9) for y in results)
