"""The kernel of `ops.predict_step` in the Triton interpreter and on a GPU: the bits of the reference."""

import os
import subprocess
import sys
from contextlib import nullcontext
from math import inf, nan

import pytest
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.core import noise
from fastddpm.reference import diffusion
from tests.support import check
from tests.support.draws import addresses, generator, numpy_warns
from tests.support.guards import GUARD
from tests.support.predict_step import (
    LAYOUTS,
    LEARNED,
    LOG_MAX,
    LOG_MIN,
    NOISE,
    NOISES,
    NOISY,
    OF_W,
    OF_X_0,
    PREDICTS,
    ROWS,
    SAMPLERS,
    SIGMA,
    SIGNAL,
    as_float64,
    assert_same_bits,
    channels_last,
    contiguous,
    entries_innermost,
    half,
    half_of_channels_last,
    inputs,
    noises,
    run,
    specified,
)

# One block of the kernel is 1024 elements, one Philox call four.
SHAPES = [(1, 1), (3, 5), (1, 1025), (1, 1, 1, 1), (3, 3, 5, 7), (1, 3, 20, 20), (2, 4, 257), (3, 1, 32, 32)]
SHAPES += [(1, 16, 8, 16), (2, 3, 2, 3, 4), (2, 5, 1, 1), (2, 5, 3, 1)]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("damage", ["last bit", "sign of zero", "shape", "dtype"])
def test_damage_to_either_result_is_detected(damage, dtype, which):
    want = tuple(torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=dtype) for _ in range(2))
    got = [a.clone() for a in want]
    assert_same_bits(got, want)
    if damage == "last bit":
        got[which][1, 1] *= 1 + torch.finfo(dtype).eps
    elif damage == "sign of zero":
        got[which][0, 0] = -0.0
    else:
        got[which] = got[which][:1] if damage == "shape" else got[which].double()
    with pytest.raises(AssertionError):
        assert_same_bits(got, want)


@pytest.mark.parametrize("source", NOISES)
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("predicts", PREDICTS)
def test_every_kind_of_step_equals_specification(predicts, sampler, clip, source, kernel_device):
    x, m, _, z = inputs((2, 3, 19, 19))
    options = {"predicts": predicts, "sampler": sampler, "clip": clip, **noises(source, z)}
    want = specified(x, m, ROWS, 12, **options)
    assert_same_bits(run(kernel_device, x, m, ROWS, 12, **options), want)
    assert clip is None or (want[1].abs() == torch.tensor(clip)).any()


@pytest.mark.parametrize("source", NOISES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_equals_specification(shape, source, kernel_device):
    x, m, v, z = inputs(shape)
    options = {"predicts": "epsilon", "sampler": "ddpm", "clip": 1.0, "learned": "learned", **noises(source, z)}
    for layout in (contiguous, channels_last):
        arguments = layout(x), layout(m), ROWS, 7
        got = run(kernel_device, *arguments, v=layout(v), **options)
        assert_same_bits(got, specified(*arguments, v=v, **options))
        assert [a.stride() for a in got] == 2 * [layout(x).stride()]


@pytest.mark.parametrize("predicts", ["epsilon", "sample"])
@pytest.mark.parametrize("z_dtype", ops.FLOATS)
@pytest.mark.parametrize("m_dtype", ops.FLOATS)
@pytest.mark.parametrize("x_dtype", ops.FLOATS)
def test_every_dtype_is_widened_first_and_rounded_once_at_the_end(x_dtype, m_dtype, z_dtype, predicts, kernel_device):
    x, m, v, z = inputs((2, 3, 5, 7), (x_dtype, m_dtype, m_dtype, z_dtype))
    for sampler, clip in (("ddim", None), ("ddim_clipped", 1.0)):
        options = {"predicts": predicts, "sampler": sampler, "clip": clip, "v": v, "learned": "learned", "z": z}
        assert_same_bits(run(kernel_device, x, m, ROWS, 3, **options), specified(x, m, ROWS, 3, **options))


@pytest.mark.parametrize("source", NOISES[:2])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 4, 9), (2, 6), (1, 16, 8, 16)], ids=str)
@pytest.mark.parametrize("of_m", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_every_layout_equals_specification(of_x, of_m, shape, source, kernel_device):
    x, m, v, z = inputs(shape)
    options = {"predicts": "v_prediction", "sampler": "ddpm", "clip": 1.0, "learned": "learned"}
    want = specified(x, m, ROWS, 20, v=v, **options, **noises(source, z))
    of_v, of_z = (LAYOUTS[(LAYOUTS.index(of_m) + k) % len(LAYOUTS)] for k in (1, 2))
    got = run(kernel_device, of_x(x), of_m(m), ROWS, 20, v=of_v(v), **options, **noises(source, of_z(z)))
    assert_same_bits(got, want)
    assert [a.stride() for a in got] == 2 * [torch.empty_like(of_x(x)).stride()]


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_m_and_v_may_be_halves_of_one_tensor(layout, kernel_device):
    """Neither is copied."""
    x, m, v, z = inputs((2, 3, 5, 7))
    m_half, v_half = layout(torch.cat([m, v], 1)).to(kernel_device).split(3, 1)
    options = {"predicts": "epsilon", "sampler": "ddpm", "clip": 1.0, "learned": "learned", "z": z}
    want = specified(x, m, ROWS, 20, v=v, **options)
    assert_same_bits(run(kernel_device, layout(x), m_half, ROWS, 20, v=v_half, **options), want)


@pytest.mark.parametrize(
    ("shape", "of_x", "of_m", "source", "dense"),
    [
        ((2, 3, 4, 5), contiguous, contiguous, "given", True),
        ((2, 3, 4, 5), channels_last, channels_last, "given", True),
        ((2, 3, 4, 5), channels_last, channels_last, "in registers", True),
        ((2, 3, 4, 5), contiguous, half, "none", True),
        ((2, 1, 4, 5), contiguous, channels_last, "in registers", True),  # one channel: the order is the same
        ((2, 3, 1, 1), contiguous, channels_last, "in registers", True),
        ((2, 6), contiguous, half, "in registers", True),
        ((2, 3, 4, 5), contiguous, contiguous, "in registers", False),  # the noise is channels-last
        ((2, 3, 4, 5), contiguous, channels_last, "none", False),
        ((2, 3, 4, 5), channels_last, half_of_channels_last, "none", False),
    ],
)
def test_tensors_of_one_dense_order_are_addressed_without_strides(
    shape, of_x, of_m, source, dense, interpreted, monkeypatch
):
    """The compiler then sees adjacent elements, and makes 16-byte accesses."""
    from fastddpm.kernels import predict_step

    seen = []
    monkeypatch.setattr(predict_step, "launch", lambda kernel, grid, *arguments, **options: seen.append(arguments))
    x, m, _, z = inputs(shape)
    ops.predict_step(of_x(x), of_m(m), ROWS, 5, **noises(source, of_x(z)))
    (arguments,) = seen
    names = predict_step.predict_step_kernel.arg_names
    assert (arguments[names.index("inner_size")] is None) == dense
    assert arguments[names.index("m_entry")] == of_m(m).stride(0)


def test_tensors_may_be_expanded(kernel_device):
    x, m, _, z = inputs((3, 2, 4, 5))
    x, m, z = x[:1].expand(3, 2, 4, 5), m[:, :1].expand(3, 2, 4, 5), z[:, :, :1, :1].expand(3, 2, 4, 5)
    options = {"predicts": "epsilon", "sampler": "ddpm", "z": z}
    assert_same_bits(run(kernel_device, x, m, ROWS, 9, **options), specified(x, m, ROWS, 9, **options))


@pytest.mark.parametrize("source", NOISES)
def test_the_row_may_lie_on_the_device(source, kernel_device):
    x, m, _, z = inputs((2, 3, 5, 7))
    options = {"predicts": "epsilon", "sampler": "ddpm", "clip": 1.0, **noises(source, z)}
    for at in (1, 2, 16, 20):
        want = specified(x, m, ROWS, at, **options)
        assert_same_bits(run(kernel_device, x, m, ROWS, at, **options), want)
        assert_same_bits(run(kernel_device, x, m, ROWS, torch.tensor(at), **options), want)


@pytest.mark.parametrize("learned", LEARNED)
def test_a_step_without_noise_reads_none(learned, kernel_device):
    """Nor does it add zeros, which would lose the sign of a mean of -0."""
    x = torch.full((2, 3, 5, 7), -0.0)
    rows, bad = ROWS.clone(), x * nan
    rows[1, [OF_X_0, SIGMA]] = torch.tensor([1.0, nan])
    assert rows[1, NOISY] == 0
    options = {"predicts": "sample", "sampler": "ddpm", "v": bad, "learned": learned}
    for source in ({"z": bad}, {"address": addresses(2)}):
        assert_same_bits(run(kernel_device, x, x, rows, 1, **options, **source), (x, x))


@numpy_warns
@pytest.mark.parametrize("clip", [None, 1.0, 5])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("predicts", PREDICTS)
def test_nan_and_inf_propagate(predicts, sampler, clip, kernel_device):
    values = torch.tensor([nan, inf, -inf, 0.5, -0.0, 3e38])
    x, m = (a.reshape(1, 36) for a in torch.meshgrid(values, values, indexing="ij"))
    options = {"predicts": predicts, "sampler": sampler, "clip": clip}
    got, want = run(kernel_device, x, m, ROWS, 5, **options), specified(x, m, ROWS, 5, **options)
    for ours, exact in zip(got, want, strict=True):
        assert torch.equal(ours.cpu().isnan(), exact.isnan())
        assert exact.isnan().any()
    assert_same_bits([a.nan_to_num(7.0) for a in got], [a.nan_to_num(7.0) for a in want])


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("at", [2, 3, 12, 20])
def test_a_variance_of_a_learned_range_is_as_accurate_as_torch(at, dtype, kernel_device):
    x, m, _, z = inputs((2, 3, 19, 19), (dtype,) * 4)
    v = (torch.rand(x.shape, generator=generator(9)) * 2.4 - 1.2).to(dtype)  # somewhat beyond the range
    options = {"predicts": "epsilon", "sampler": "ddpm", "clip": 1.0, "v": v, "learned": "learned_range", "z": z}
    ours, x_0 = run(kernel_device, x, m, ROWS, at, **options)
    plain = diffusion.predict_step(x, m, ROWS[at].to(dtype), **options)[0]
    check.assert_as_accurate(ours.cpu(), plain, as_float64(x, m, ROWS, at, **options))
    assert torch.equal(x_0.cpu(), specified(x, m, ROWS, at, **options)[1])


def exponential(y: Tensor, device) -> tuple[Tensor, Tensor]:
    """The kernel's exponential, and its argument: y, as learned_range computes it."""
    row = torch.zeros(1, 8)
    row[0, SIGNAL] = row[0, LOG_MAX] = row[0, NOISY] = 1.0
    v, none, one = 4 * y - 1, torch.zeros_like(y), torch.ones_like(y)
    options = {"predicts": "epsilon", "sampler": "ddpm", "v": v, "learned": "learned_range", "z": one}
    return run(device, none, none, row, 0, **options)[0].cpu(), (v + 1) / 2 * 0.5


def test_the_exponential_errs_by_at_most_an_ulp(kernel_device):
    y = torch.cat([torch.linspace(-104, 88.7, 6001), torch.linspace(-1, 1, 2000), torch.tensor([0.0, 1.0, -87.4])])
    got, y = exponential(y[None], kernel_device)
    exact = y.double().exp()
    ulp = torch.nextafter(exact.float(), torch.tensor(inf)).double() - exact.float()
    assert ((got.double() - exact).abs() <= ulp).all()
    assert (exact < torch.finfo(torch.float32).tiny).any()


@numpy_warns
def test_the_exponential_overflows_to_inf_and_underflows_to_zero(kernel_device):
    y = torch.tensor([[89.0, 1e4, 3e30, -104.5, -1e4, -3e30, nan]])
    got, _ = exponential(y, kernel_device)
    assert got[0, :-1].tolist() == [inf, inf, inf, 0.0, 0.0, 0.0]
    assert got[0, -1].isnan()


@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("column", range(8))
def test_a_damaged_coefficient_is_detected(column, learned, kernel_device):
    """One bit of damage, by the comparison that all tests here make."""
    x, m, v, z = inputs((2, 3, 5, 7))
    options = {"predicts": "epsilon", "sampler": "ddpm", "v": v, "learned": learned, "z": z}
    want = tuple(a.cpu() for a in run(kernel_device, x, m, ROWS, 12, **options))
    rows = ROWS.clone()
    rows[12, column] = 0 if column == NOISY else torch.nextafter(rows[12, column], torch.tensor(inf))
    got = run(kernel_device, x, m, rows, 12, **options)
    columns_read = {None: {SIGMA}, "learned": set(), "learned_range": {LOG_MIN, LOG_MAX}}[learned]
    if column in columns_read | {SIGNAL, NOISE, OF_X_0, OF_W, NOISY}:
        with pytest.raises(AssertionError):
            assert_same_bits(got, want)
    else:
        assert_same_bits(got, want)


@pytest.mark.parametrize("layout", [contiguous, channels_last, entries_innermost])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_only_the_elements_of_the_results_are_written(shape, layout, kernel_device):
    from fastddpm.kernels.predict_step import launch_predict_step

    x, m, v, z = (layout(a) for a in inputs(shape, (torch.float32, torch.float16, torch.float32, torch.bfloat16)))
    options = {"predicts": "sample", "sampler": "ddpm", "clip": 1.0, "learned": "learned"}
    size, held = x.numel(), [a.to(kernel_device, copy=True) for a in (x, m, v, z)]
    memory = [torch.full((size + 2 * GUARD,), nan, dtype=a.dtype, device=kernel_device) for a in (x, m)]
    out = [a[GUARD : GUARD + size].as_strided(x.shape, x.stride()) for a in memory]
    launch_predict_step(*out, *held, ROWS.to(kernel_device), 5, None, **options)
    assert_same_bits(out, specified(x, m, ROWS, 5, v=v, z=z, **options))
    for a in memory:
        assert a[:GUARD].isnan().all()
        assert a[-GUARD:].isnan().all()
    for a, before in zip(held, (x, m, v, z), strict=True):
        assert torch.equal(a.cpu(), before)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_unaligned_memory(layout, kernel_device):
    x, m, v, z = inputs((2, 16, 8, 8), (torch.float32, torch.bfloat16, torch.float32, torch.float32))
    held = []
    for k, a in enumerate((x, m, v, z), 1):
        memory = torch.full((a.numel() + k,), nan, dtype=a.dtype, device=kernel_device)
        held.append(memory[k:].as_strided(a.shape, layout(a).stride(), k).copy_(a))
    options = {"predicts": "epsilon", "sampler": "ddpm", "clip": 1.0, "learned": "learned"}
    got = run(kernel_device, *held[:2], ROWS, 5, v=held[2], z=held[3], **options)
    assert_same_bits(got, specified(x, m, ROWS, 5, v=v, z=z, **options))


def test_empty_input_gives_empty_output(kernel_device):
    x = torch.empty(0, 3, 4, 4)
    for source in ({"z": x}, {"address": noise.address(0, 0)}, {}):
        assert [a.shape for a in run(kernel_device, x, x, ROWS, 5, **source)] == 2 * [x.shape]


FAR = """
import sys, torch
from fastddpm.kernels.predict_step import launch_predict_step
from fastddpm.reference.diffusion import predict_step

device, far = sys.argv[1], 1 << 30
row = torch.tensor([[0.9, 0.5, 0.3, 0.7, 0.1, 0.0, 0.0, 1.0]])
x, m, z = torch.randn(3, 3, 3, 5, 5, generator=torch.Generator().manual_seed(0)).half()
options = {"predicts": "epsilon", "sampler": "ddpm", "clip": 1.0, "learned": None}
want = [a.half() for a in predict_step(x.float(), m.float(), row[0], z=z.float(), clip=1.0)]
# on a CPU, untouched memory takes no physical pages
x_prev, x_0, there = (torch.empty(2 * far + 75, dtype=torch.float16, device=device) for _ in range(3))
for strides in ((far, 25, 5, 1), (25, far, 5, 1)):  # entries, then channels, beyond 32 bits
    out = [a.as_strided(x.shape, strides).fill_(torch.nan) for a in (x_prev, x_0)]
    held = there.as_strided(x.shape, strides).copy_(x), m.to(device), None, z.to(device), row.to(device)
    launch_predict_step(*out, *held, 0, None, **options)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(out, want))
"""


@pytest.mark.slow
def test_offsets_beyond_32_bits(kernel_device):
    """Runs in a subprocess, as a wrong address may crash it."""
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 16e9:
        pytest.skip("needs 16 GB of memory: it reserves 13 GB, though it touches little of it")
    subprocess.run([sys.executable, "-c", FAR, kernel_device], check=True)


def test_kernel_is_launched_on_the_device_of_x(interpreted, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or nullcontext())
    x, m, *_ = inputs((2, 3, 4, 4))
    ops.predict_step(x, m, ROWS, 5)
    assert len(seen) == 1
    assert seen[0] is x
