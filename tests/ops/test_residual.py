"""`ops.residual` of every backend: the bits of fp32 arithmetic, rounded once."""

import os
import subprocess
import sys
from contextlib import nullcontext
from math import inf, nan

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastddpm import ops
from fastddpm.core import layout
from tests.support.bits import assert_same_bits
from tests.support.check import error_line
from tests.support.draws import generator, numpy_warns
from tests.support.guards import Guards

# One block of the kernel is 1024 elements.
SHAPES = [
    (2, 8, 4, 4),
    (1, 1, 1, 1),
    (3, 5, 7, 11),
    (2, 64, 16),
    (1, 33, 32),
    (2, 1, 1025),
    (4, 1024),
    (2, 3, 2, 2, 100),
]


def inputs(shape, dtype=torch.float32, bias=True):
    h, residual = (
        layout.channels_last((torch.randn(shape, generator=generator(i)) * 10**i).to(dtype)) for i in range(2)
    )
    return h, residual, torch.randn(shape[1], generator=generator(2)) if bias else None


def summed(h: Tensor, residual: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor:
    """The specification."""
    total = h.float() + residual.float()
    total = total if bias is None else total + bias.view(-1, *[1] * (h.ndim - 2))
    return (total / scale).to(h.dtype)


def run(device, h, residual, bias):
    return ops.residual(h.to(device, copy=True), residual.to(device), None if bias is None else bias.to(device))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_equals_specification(shape, dtype, bias, device):
    h, residual, bias = inputs(shape, dtype, bias)
    guards = Guards()
    held, other = guards.holding(h, device), guards.holding(residual, device)
    got = ops.residual(held, other, None if bias is None else bias.to(device))
    assert got is held
    assert_same_bits(got, summed(h, residual, bias))
    assert_same_bits(other, residual)
    guards.check()


@pytest.mark.parametrize("scale", [1, 3, 2**0.5])
@pytest.mark.parametrize("dtype", ops.FLOATS)
def test_residual_divides_by_the_scale(dtype, scale, device):
    for bias in (False, True):
        h, residual, bias = inputs((3, 5, 7, 11), dtype, bias)
        got = ops.residual(
            h.to(device, copy=True), residual.to(device), None if bias is None else bias.to(device), scale
        )
        assert_same_bits(got, summed(h, residual, bias, scale))


@pytest.mark.parametrize("scale", [0, -1.0, inf, nan, None, "1"])
def test_residual_rejects_a_scale(scale):
    h, residual, bias = inputs((2, 8, 4, 4))
    with pytest.raises(ValueError, match=r"^residual: scale is .*; want a number > 0$"):
        ops.residual(h, residual, bias, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_rounds_once(dtype, device):
    half = torch.finfo(dtype).eps / 2
    h, residual = torch.ones(1, 1, dtype=dtype), torch.full((1, 1), half, dtype=dtype)  # a tie, which rounds to even: 1
    assert run(device, h, residual, None).item() == 1
    assert run(device, h, residual, torch.tensor([half / 8])).item() == 1 + 2 * half
    assert run(device, -h, -residual, torch.tensor([-half / 8])).item() == -1 - 2 * half


@numpy_warns
@pytest.mark.parametrize("dtype", ops.FLOATS)
def test_nan_and_inf_propagate(dtype, device):
    values = torch.tensor([[inf, inf, nan, -0.0, torch.finfo(dtype).max, 1.0]], dtype=dtype)
    others = torch.tensor([[-inf, 1.0, 2.0, -0.0, torch.finfo(dtype).max, nan]], dtype=dtype)
    got, want = run(device, values, others, None).cpu(), summed(values, others, None)
    assert torch.equal(got.isnan(), want.isnan())
    assert_same_bits(got.nan_to_num(), want.nan_to_num())
    assert want.isnan().tolist() == [[True, False, True, False, False, True]]


def test_unaligned_memory(device):
    h, residual, bias = inputs((2, 16, 4, 4), torch.bfloat16)
    memory = [torch.full((h.numel() + 3,), nan, dtype=h.dtype, device=device) for _ in range(2)]
    odd = [a[k:][: h.numel()].view(2, 4, 4, 16).movedim(-1, 1) for k, a in zip((1, 3), memory, strict=True)]
    got = ops.residual(odd[0].copy_(h), odd[1].copy_(residual), bias.to(device))
    assert_same_bits(got, summed(h, residual, bias))


def test_h_and_residual_may_be_the_same_tensor(device):
    h, _, bias = inputs((2, 8, 4, 4), torch.float16)
    held = h.to(device, copy=True)
    assert_same_bits(ops.residual(held, held, bias.to(device)), summed(h, h, bias))


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty_input_is_unchanged(shape, device):
    assert run(device, *inputs(shape)).shape == shape


FAR = """
import sys, torch
from fastddpm.kernels.residual import BLOCK, OPTIONS, residual_kernel

device, n, per_sample = sys.argv[1], 34, 1 << 26
assert (n - 1) * per_sample > 2**31

def far(value):  # on a CPU, untouched memory takes no physical pages
    memory = torch.empty(n * per_sample, dtype=torch.float16, device=device)
    blocks = memory.view(n, per_sample)[:, :BLOCK]
    return memory, blocks.copy_(value)

drawn, bias = torch.randn(2, n, BLOCK, generator=torch.Generator().manual_seed(0)).half(), torch.randn(8)
(h, blocks), (residual, _) = far(drawn[0]), far(drawn[1])
residual_kernel[n,](h, residual, bias.to(device), per_sample, 8, 1, 1.0, SCALE=False, BLOCK=BLOCK, **OPTIONS)
want = (drawn[0].float() + drawn[1].float() + bias.repeat(BLOCK // 8)).half()
assert torch.equal(blocks.cpu(), want)
"""


@pytest.mark.slow
def test_offsets_beyond_32_bits(kernel_device):
    """Computes the first block of 34 large samples, in a subprocess, as a wrong address may crash it."""
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 16e9:
        pytest.skip("needs 16 GB of memory: it reserves 9 GB, though it touches little of it")
    subprocess.run([sys.executable, "-c", FAR, kernel_device], check=True)


def test_kernel_is_launched_on_the_device_of_h(interpreted, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or nullcontext())
    h, residual, bias = inputs((2, 8, 4, 4))
    ops.residual(h, residual, bias)
    assert len(seen) == 1
    assert seen[0] is h


BAD = [
    ("h", lambda h: h.double(), "h is (2, 8, 4, 4) torch.float64 on cpu; want [N, C, *spatial] or [N, D] of float32,"),
    ("h", lambda h: h.contiguous(), "h has strides (128, 16, 4, 1), not channels-last; use layout.channels_last(h)"),
    (
        "h",
        lambda h: h.clone().requires_grad_(),
        "h requires a gradient, but residual is not differentiable in it; call it under",
    ),
    (
        "h",
        lambda h: h.half(),
        "residual is (2, 8, 4, 4) torch.float32 on cpu; want [N, C, *spatial] or [N, D] of float16",
    ),
    ("residual", lambda r: r[:1], "residual is (1, 8, 4, 4) torch.float32 on cpu; want (2, 8, 4, 4) on cpu, like h"),
    ("residual", lambda r: r.to("meta"), "residual is (2, 8, 4, 4) torch.float32 on meta; want (2, 8, 4, 4) on cpu"),
    ("residual", lambda r: None, "residual is NoneType; want [N, C, *spatial] or [N, D] of float32"),
    ("residual", lambda r: r.contiguous(), "residual has strides (128, 16, 4, 1), not channels-last"),
    ("residual", lambda r: r.clone().requires_grad_(), "residual requires a gradient"),
    ("bias", lambda b: b[:4], "bias is (4,) torch.float32 on cpu; want (8,) torch.float32 on cpu, contiguous"),
    ("bias", lambda b: b.half(), "bias is (8,) torch.float16 on cpu; want (8,) torch.float32"),
    ("bias", lambda b: b.repeat(2)[::2], "bias is (8,) torch.float32 on cpu; want (8,) torch.float32 on cpu, contig"),
    ("bias", lambda b: b.to("meta"), "bias is (8,) torch.float32 on meta; want (8,) torch.float32 on cpu"),
    ("bias", lambda b: b.clone().requires_grad_(), "bias requires a gradient"),
]


@pytest.mark.parametrize(("name", "damage", "message"), BAD)
def test_residual_rejects_invalid_arguments(name, damage, message):
    arguments = dict(zip(("h", "residual", "bias"), inputs((2, 8, 4, 4)), strict=True))
    before = arguments["h"].clone()
    text = error_line(ops.residual, **arguments | {name: damage(arguments[name])})
    assert text.startswith(f"residual: {message}")
    assert torch.equal(arguments["h"], before)


def test_samples_too_large_for_32_bit_offsets_are_rejected():
    largest, beyond = (layout.empty(1, (1, (1 << 29) + i), dtype=torch.float16, device="meta") for i in range(2))
    assert ops.residual(largest, largest) is largest
    assert "a sample may have at most 536870912 elements" in error_line(ops.residual, beyond, beyond)


def test_autograd_detects_that_h_was_overwritten(device):
    h, residual, bias = (a.to(device) for a in inputs((2, 8, 4, 4)))
    weight = torch.ones_like(h, requires_grad=True)
    loss = (weight * h).sum()
    ops.residual(h, residual, bias)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_residual_in_inference_mode(device):
    h, residual, bias = inputs((2, 8, 4, 4))
    with torch.inference_mode():
        got = run(device, h, residual, bias)
    assert_same_bits(got, summed(h, residual, bias))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_traces_residual(device, dynamic):
    def block(h, residual, bias):
        return ops.residual(h * 2, residual, bias) + ops.residual(h, residual)

    arguments, again = ([a.to(device) for a in inputs((2, 8, 4, 4), torch.bfloat16)] for _ in range(2))
    arguments[2], again[2] = arguments[2].float(), again[2].float()
    want = block(*arguments)
    got = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*again)
    assert torch.equal(got, want)
    assert torch.equal(again[0], arguments[0])


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_residual_passes_opcheck(bias, device):
    h, residual, bias = inputs((2, 8, 4, 4), torch.float16, bias)
    arguments = h.to(device), residual.to(device), None if bias is None else bias.to(device), 1.5
    torch.library.opcheck(torch.ops.fastddpm.residual.default, arguments)


def test_residual_supports_fake_tensors():
    with FakeTensorMode():
        h, residual = (torch.empty(2, 4, 4, 8, device="cuda").movedim(3, 1) for _ in range(2))
        assert ops.residual(h, residual, torch.empty(8, device="cuda")) is h


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_captured_residual_reads_current_values():
    h, residual, bias = inputs((2, 16, 8, 8), torch.bfloat16)
    held, other, shift = h.cuda(), residual.cuda(), bias.cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        ops.residual(held.clone(), other, shift)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.residual(held, other, shift)
    for k in range(2):
        other.mul_(2)
        shift.add_(k)
        h, residual, bias = summed(h, residual * 2, bias + k), residual * 2, bias + k
        graph.replay()
        assert_same_bits(held, h)
