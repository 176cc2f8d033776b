"""`ops.interleave` in torch, in the Triton interpreter and on a GPU, bit for bit; and `Upsample`, which uses it."""

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from itertools import product
from math import inf, nan

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastddpm import ops
from fastddpm.core import layout
from fastddpm.core.precision import arithmetic
from fastddpm.networks import unet2d
from fastddpm.networks.layers import Upsample
from fastddpm.networks.unet2d import UNet2D
from fastddpm.reference.unet import UNet
from tests.support.bits import assert_same_bits
from tests.support.check import TINY, assert_as_accurate, error_line
from tests.support.draws import generator, numpy_warns

# (N, C, H, W) before upsampling. A program of the kernel covers 32 pixels of 64 channels, or more of fewer channels.
SHAPES = [
    (2, 8, 4, 4),
    (1, 1, 1, 1),
    (3, 5, 2, 3),
    (1, 64, 1, 5),
    (2, 65, 3, 1),
    (1, 200, 5, 3),
    (1, 3, 17, 21),
    (2, 128, 4, 4),
]


def inputs(shape, dtype=torch.float32, bias=True):
    n, c, height, width = shape
    y = layout.channels_last(torch.randn(n, 4 * c, height + 1, width + 1, generator=generator(0)).to(dtype))
    return y, 10 * torch.randn(c, generator=generator(1)) if bias else None


def reference_interleave(y: Tensor, bias: Tensor | None) -> Tensor:
    """The specification of `ops.interleave`, in plain torch."""
    n, c, height, width = len(y), y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1
    out = y.new_empty(n, c, 2 * height, 2 * width)
    for a, b in product(range(2), range(2)):
        phase = y.unflatten(1, (4, c))[:, 2 * a + b, :, a : a + height, b : b + width]
        out[:, :, a::2, b::2] = phase if bias is None else (phase.float() + bias.view(-1, 1, 1)).to(y.dtype)
    return layout.channels_last(out)


def run(device, y, bias=None):
    return ops.interleave(y.to(device), None if bias is None else bias.to(device))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interleave_equals_specification(shape, dtype, bias, device, guards):
    y, bias = inputs(shape, dtype, bias)
    held = guards.holding(y, device)
    assert_same_bits(ops.interleave(held, None if bias is None else bias.to(device)), reference_interleave(y, bias))
    assert_same_bits(held, y)
    guards.check()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_more_programs_than_grid_axis_1_allows():
    y, bias = inputs((70_000, 1, 1, 1), torch.bfloat16)
    assert_same_bits(run("cuda", y, bias), reference_interleave(y, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_interleave_rounds_once(dtype, device):
    half, y = torch.finfo(dtype).eps / 2, layout.channels_last(torch.ones(1, 4, 2, 2, dtype=dtype))
    assert run(device, y, torch.tensor([half])).tolist() == [[[[1, 1], [1, 1]]]]  # a tie, which rounds to even: 1
    assert run(device, y, torch.tensor([half * 1.125])).tolist() == [[[[1 + 2 * half] * 2] * 2]]


@numpy_warns
@pytest.mark.parametrize("dtype", ops.FLOATS)
def test_nan_and_inf_propagate(dtype, device):
    y, bias = inputs((1, 4, 2, 3), dtype)
    y[0, ::3, 1, 1:], y[0, 1::3, 1, 1:], bias[0], bias[1] = nan, -inf, inf, nan
    assert_same_bits(run(device, y), reference_interleave(y, None))  # a copy keeps the bits even of NaN
    got, want = run(device, y, bias).cpu(), reference_interleave(y, bias)
    assert want.isnan().any()
    assert want.isinf().any()
    assert torch.equal(got.isnan(), want.isnan())
    assert_same_bits(got.nan_to_num(), want.nan_to_num())


def test_unaligned_memory(device):
    y, bias = inputs((2, 16, 3, 3), torch.bfloat16)
    memory = torch.full((y.numel() + 1,), nan, dtype=y.dtype, device=device)
    odd = memory[1:].view(2, 4, 4, 64).movedim(-1, 1).copy_(y)
    assert_same_bits(ops.interleave(odd, bias.to(device)), reference_interleave(y, bias))


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 0, 4, 4)], ids=str)
def test_empty_input_gives_empty_output(shape, device):
    n, c, height, width = shape
    assert run(device, *inputs(shape)).shape == (n, c, 2 * height, 2 * width)


FAR = """
import sys, torch
from itertools import product
from fastddpm.kernels.interleave import OPTIONS, interleave_kernel

device, n, side, channels = sys.argv[1], 34, 4, 1 << 20  # only the first 64 channels are computed
assert (n - 1) * 4 * side * side * channels > 2**31

def far(*shape):  # on a CPU, untouched memory takes no physical pages
    memory = torch.empty(n, *shape, channels, dtype=torch.float16, device=device)
    return memory, memory[..., :64]

drawn, bias = torch.randn(n, side + 1, side + 1, 2, 2, 64, generator=torch.Generator().manual_seed(0)), torch.randn(64)
(y, first), (out, got) = far(side + 1, side + 1, 2, 2), far(side, 2, side, 2)
first.copy_(drawn)
tile = {"CHANNELS": 64, "PIXELS": 32, "STRIPES": 1}
interleave_kernel[2 * n,](out, y, bias.to(device), side, side, channels, **tile, **OPTIONS)
for a, b in product(range(2), range(2)):
    want = (drawn.half()[:, a : a + side, b : b + side, a, b].float() + bias).half()
    assert torch.equal(got[:, :, a, :, b].cpu(), want)
"""


@pytest.mark.slow
def test_offsets_beyond_32_bits(kernel_device):
    """Computes the first channels of 34 large samples, in a subprocess, as a wrong address may crash it."""
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 16e9:
        pytest.skip("needs 16 GB of memory: it reserves 12 GB, though it touches little of it")
    subprocess.run([sys.executable, "-c", FAR, kernel_device], check=True)


def test_kernel_is_launched_on_the_device_of_y(interpreted, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or nullcontext())
    y, bias = inputs((2, 8, 4, 4))
    ops.interleave(y, bias)
    assert len(seen) == 1
    assert seen[0] is y


# Invalid arguments

WANT = "want [N, 4 C, H + 1, W + 1] for an image of H x W pixels"
BAD = [
    ("y", lambda y: y.double(), "y is (2, 32, 5, 5) torch.float64 on cpu; want [N, C, *spatial] or [N, D] of float32,"),
    ("y", lambda y: None, "y is NoneType; want [N, C, *spatial] or [N, D] of float32"),
    ("y", lambda y: y.contiguous(), "y has strides (800, 25, 5, 1), not channels-last; use layout.channels_last(y)"),
    (
        "y",
        lambda y: y.clone().requires_grad_(),
        "y requires a gradient, but interleave is not differentiable in it; call it under",
    ),
    ("y", lambda y: y.flatten(2), f"y is (2, 32, 25) torch.float32 on cpu; {WANT}"),
    ("y", lambda y: layout.channels_last(y[:, :30]), f"y is (2, 30, 5, 5) torch.float32 on cpu; {WANT}"),
    ("y", lambda y: layout.channels_last(y[:, :, :1]), f"y is (2, 32, 1, 5) torch.float32 on cpu; {WANT}"),
    ("y", lambda y: layout.channels_last(y[..., :0]), f"y is (2, 32, 5, 0) torch.float32 on cpu; {WANT}"),
    ("bias", lambda b: b[:4], "bias is (4,) torch.float32 on cpu; want (8,) torch.float32 on cpu, contiguous"),
    ("bias", lambda b: b.half(), "bias is (8,) torch.float16 on cpu; want (8,) torch.float32"),
    ("bias", lambda b: b.repeat(2)[::2], "bias is (8,) torch.float32 on cpu; want (8,) torch.float32 on cpu, contig"),
    ("bias", lambda b: b.to("meta"), "bias is (8,) torch.float32 on meta; want (8,) torch.float32 on cpu"),
    ("bias", lambda b: b.clone().requires_grad_(), "bias requires a gradient"),
]


@pytest.mark.parametrize(("name", "damage", "message"), BAD)
def test_interleave_rejects_invalid_arguments(name, damage, message):
    arguments = dict(zip(("y", "bias"), inputs((2, 8, 4, 4)), strict=True))
    text = error_line(ops.interleave, **arguments | {name: damage(arguments[name])})
    assert text.startswith(f"interleave: {message}")


def test_samples_too_large_for_32_bit_offsets_are_rejected():
    largest, beyond = (layout.empty(1, (1 << 27, 2, 2 + i), dtype=torch.float16, device="meta") for i in range(2))
    assert ops.interleave(largest).shape == (1, 1 << 25, 2, 2)
    assert "a sample may have at most 536870912 elements" in error_line(ops.interleave, beyond)


# torch.compile, fake tensors, graphs


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_traces_interleave(device, dynamic):
    def block(y, bias):
        return ops.interleave(y * 2, bias) + ops.interleave(y)

    arguments = [a.to(device) for a in inputs((2, 8, 4, 4))]
    got = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*arguments)
    assert torch.equal(got, block(*arguments))
    assert layout.is_channels_last(got)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_interleave_passes_opcheck(bias, device):
    y, bias = inputs((2, 8, 4, 4), torch.float16, bias)
    arguments = y.to(device), None if bias is None else bias.to(device)
    torch.library.opcheck(torch.ops.fastddpm.interleave.default, arguments)


def test_interleave_supports_fake_tensors():
    with FakeTensorMode():
        y = torch.empty(2, 4, 6, 32, dtype=torch.bfloat16, device="cuda").movedim(3, 1)
        out = ops.interleave(y, torch.empty(8, device="cuda"))
        assert (out.shape, out.dtype, out.device) == ((2, 8, 6, 10), y.dtype, y.device)
        assert layout.is_channels_last(out)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_captured_interleave_reads_current_values():
    y, bias = inputs((2, 16, 8, 8), torch.bfloat16)
    held, shift = y.cuda(), bias.cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        ops.interleave(held, shift)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.interleave(held, shift)
    held.mul_(2)
    shift.add_(1)
    graph.replay()
    assert_same_bits(out, reference_interleave(y * 2, bias + 1))


# The networks


def polyphase(plain: Upsample, dtype: torch.dtype, device: str) -> Upsample:
    """Build a polyphase `Upsample` from a float32 one, as `UNet2D.for_inference` does."""
    kernels = ops.backend(device) == "triton"
    made, weights = Upsample(plain.conv.in_channels), dict(plain.fused_parameters())
    made.fuse(kernels)
    made.phases.kernels = kernels
    made.phases.to(dtype)
    for name, parameter in made.named_parameters():
        parameter.data = weights[name].to(parameter.dtype)
    return made.to(device, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 12, 3, 5), (2, 32, 8, 8)], ids=str)
@torch.no_grad()
def test_polyphase_is_as_accurate_as_interpolation(shape, dtype, device):
    torch.manual_seed(0)
    plain = Upsample(shape[1])
    x = layout.channels_last(torch.randn(shape).to(device, dtype))
    upsample = polyphase(plain, dtype, device)
    names = {"phases.weight", "bias" if ops.backend(device) == "triton" else "phases.bias"}
    assert {name for name, _ in upsample.named_parameters()} == names
    assert upsample.bias is None or upsample.bias.dtype == torch.float32
    ref = copy.deepcopy(plain).to(device, torch.float64)(x.double())
    with arithmetic("fp32", x.device):
        got, theirs = upsample(x), plain.to(device, dtype)(x)
    assert got.dtype == dtype
    assert layout.is_channels_last(got)
    assert_as_accurate(got, theirs, ref)
    with pytest.raises(AssertionError):
        assert_as_accurate(got.flip(3), theirs, ref)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_network_with_kernels_is_as_accurate_as_the_reference_in_both_forms(dtype, kernel_device, monkeypatch):
    torch.manual_seed(0)
    net, reference = UNet2D(**TINY).eval(), UNet(**TINY).eval()
    reference.load_state_dict(net.state_dict())
    x, t = torch.randn(1, 3, 8, 8).to(kernel_device, dtype), torch.tensor([300], device=kernel_device)
    ref = copy.deepcopy(reference).to(kernel_device, torch.float64)(x.double(), t)
    for types in ((), (kernel_device,)):
        monkeypatch.setattr(unet2d, "POLYPHASE_DEVICES", types)
        fast = net.for_inference(dtype, kernel_device)
        assert {module.phases is not None for module in upsamplers(fast)} == {bool(types)}
        with arithmetic("fp32", x.device):
            ours, theirs = fast.denoise(x, fast.time_rows(t)), reference.to(kernel_device, dtype)(x, t)
        assert_as_accurate(ours, theirs, ref)


def upsamplers(net: UNet2D) -> list[Upsample]:
    return [module for module in net.modules() if isinstance(module, Upsample)]


@pytest.mark.parametrize("listed", [False, True])
def test_gpu_upsampling_is_polyphase_only_if_listed(listed, monkeypatch):
    """With parameters on the meta device, which holds no values."""
    monkeypatch.setattr(UNet2D, "to_empty", lambda net, device: nn.Module.to_empty(net, device="meta"))
    monkeypatch.setattr(UNet2D, "refresh", lambda net, source: None)
    if listed:
        monkeypatch.setattr(unet2d, "POLYPHASE_DEVICES", (*unet2d.POLYPHASE_DEVICES, "cuda"))
    with ops.forced_backend("triton"):
        net = UNet2D(**TINY).for_inference(torch.bfloat16, "cuda")
        for upsample in upsamplers(net):
            own = {name: (tuple(value.shape), value.dtype) for name, value in upsample.named_parameters()}
            if listed:
                assert own == {"phases.weight": ((64, 16, 2, 2), torch.bfloat16), "bias": ((16,), torch.float32)}
            else:
                assert own == {"conv.weight": ((16, 16, 3, 3), torch.bfloat16), "conv.bias": ((16,), torch.bfloat16)}
        rows = torch.empty(1, sum(resnet.columns for resnet in net.resnets), device="meta")
        assert net.denoise(torch.empty(2, 3, 16, 16, dtype=torch.bfloat16, device="meta"), rows).shape == (2, 3, 16, 16)
