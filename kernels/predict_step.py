"""Fused prediction and reverse step of diffusers' schedulers: reads x, m, optionally v and z; writes x_prev and x_0.

Traffic: the element sizes of what is read and written: 16 bytes per element in fp32 with z made in registers, 20 with z
given. 16-byte accesses if all tensors have one dense order; each may have its own stride from entry to entry.
Precision: all arithmetic in fp32 in the written order, each result correctly rounded; x_prev and x_0 are rounded once.
Spec: fastddpm/reference/diffusion.py::predict_step with fastddpm/core/noise.py, stream 0.
Proof: tests/ops/test_predict_step.py (bits; the exponential of learned_range against float64),
tests/kernels/test_compiled.py, tests/sampling/test_gpu.py.
"""

from functools import lru_cache
from itertools import chain
from math import prod

import torch
import triton
import triton.language as tl

from .columns import LOG_MAX, LOG_MIN, NOISE, NOISY, OF_W, OF_X_0, PREDICT_STEP_COLUMNS, SIGMA, SIGNAL
from .launch import launch
from .philox import STEP_STREAM, entry_normals

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # 8 elements per thread: 16 bytes of bf16
# of a kernel that draws noise in another order than that of memory: left alone, Triton 3.6 spills 24 bytes on sm_100
CROSSING = OPTIONS | {"maxnreg": 128}


@triton.jit(do_not_specialize=["at"])  # compiled once for all rows
def predict_step_kernel(
    x_prev_ptr,  # [N, C, P] fp32, bf16 or fp16
    x_0_ptr,  # like x_prev, but its dtype may differ
    x_ptr,  # [N, C, P]; x, m, v and z each have their own dtype and strides
    m_ptr,  # the network's output
    v_ptr,  # the network's output for the variance, or None
    z_ptr,  # standard normal, or None
    row_ptr,  # [R, 8] fp32: the columns of columns.py
    at,  # the row: an integer, or a pointer to an int64; row i is of timestep i - 1
    address_ptr,  # [N, 2] int64: (seed, sample index) of each entry, or None
    clip,  # x_0 is clamped to +-clip; or None
    per_sample,
    inner_size,  # C or P, whichever is innermost in the order of the elements; None: elements in the order of memory
    x_prev_entry,  # strides: from entry to entry,
    x_prev_outer,  # along the outer of C and P,
    x_prev_inner,  # along the inner
    x_entry,
    x_outer,
    x_inner,
    m_entry,
    m_outer,
    m_inner,
    v_entry,
    v_outer,
    v_inner,
    z_entry,
    z_outer,
    z_inner,
    PREDICTS: tl.constexpr,
    SAMPLER: tl.constexpr,
    LEARNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # axis 0: axes 1 and 2 stop at 65,535
    block = tl.program_id(1)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < per_sample
    if at.dtype.is_ptr():
        at = tl.load(at)
    row = row_ptr + at.to(tl.int64) * PREDICT_STEP_COLUMNS

    x = _load_widened(x_ptr, _place(n, offs, inner_size, x_entry, x_outer, x_inner), mask)
    m = _load_widened(m_ptr, _place(n, offs, inner_size, m_entry, m_outer, m_inner), mask)
    v = _load_widened(v_ptr, _place(n, offs, inner_size, v_entry, v_outer, v_inner), mask)
    z = _load_widened(z_ptr, _place(n, offs, inner_size, z_entry, z_outer, z_inner), mask)
    signal, noise = tl.load(row + SIGNAL), tl.load(row + NOISE)

    x_0 = _predicted_x_0(x, m, signal, noise, clip, PREDICTS)
    place = _place(n, offs, inner_size, x_prev_entry, x_prev_outer, x_prev_inner)
    tl.store(x_0_ptr + place, x_0.to(x_0_ptr.dtype.element_ty), mask=mask)
    w = _second_term(x, m, x_0, signal, noise, PREDICTS, SAMPLER)
    x_prev = tl.load(row + OF_X_0) * x_0 + tl.load(row + OF_W) * w

    if z_ptr is not None or address_ptr is not None:
        noisy = tl.load(row + NOISY)
        if noisy != 0:
            added = z if z_ptr is not None else entry_normals(n, STEP_STREAM, at - 1, block, address_ptr, BLOCK)
            x_prev += _standard_deviation(row, v, LEARNED) * added

    tl.store(x_prev_ptr + place, x_prev.to(x_prev_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _predicted_x_0(x, m, signal, noise, clip, PREDICTS: tl.constexpr):
    """x_0 as the scheduler predicts it, clamped if clip is not None."""
    # here and below the order of operations is the specification: results are compared bit for bit
    if PREDICTS == "epsilon":
        x_0 = tl.div_rn(x - noise * m, signal)
    elif PREDICTS == "sample":
        x_0 = m
    else:
        x_0 = signal * x - noise * m
    if clip is not None:
        x_0 = tl.maximum(x_0, -clip, propagate_nan=tl.PropagateNan.ALL)
        x_0 = tl.minimum(x_0, clip, propagate_nan=tl.PropagateNan.ALL)
    return x_0


@triton.jit
def _second_term(x, m, x_0, signal, noise, PREDICTS: tl.constexpr, SAMPLER: tl.constexpr):
    """The second term of the mean, besides x_0: x for DDPM, eps for DDIM."""
    if SAMPLER == "ddpm":
        w = x
    elif SAMPLER == "ddim_clipped":
        w = tl.div_rn(x - signal * x_0, noise)
    elif PREDICTS == "epsilon":
        w = m
    elif PREDICTS == "sample":
        w = tl.div_rn(x - signal * m, noise)
    else:
        w = signal * m + noise * x
    return w


@triton.jit
def _standard_deviation(row, v, LEARNED: tl.constexpr):
    """The factor of z: sigma, or that of the variance which the network returned as v."""
    if LEARNED is None:
        sigma = tl.load(row + SIGMA)
    elif LEARNED == "learned":
        sigma = tl.sqrt_rn(v)
    else:
        share = (v + 1) * 0.5
        log_var = share * tl.load(row + LOG_MAX) + (1 - share) * tl.load(row + LOG_MIN)
        sigma = _exp(0.5 * log_var)
    return sigma


@triton.jit
def _load_widened(x_ptr, place, mask):
    """Load elements as fp32; None if there is no tensor."""
    if x_ptr is not None:
        return tl.load(x_ptr + place, mask=mask, other=0).to(tl.float32)


@triton.jit
def _place(n, offs, inner_size, entry, outer, inner):
    """Where the elements of entry n lie, int64."""
    if inner_size is None:
        return n * entry + offs
    else:
        return n * entry + (offs // inner_size).to(tl.int64) * outer + (offs % inner_size).to(tl.int64) * inner


@triton.jit
def _exp(y):
    """e^y within an ulp (coefficients from Cephes, S. Moshier); the error of tl.exp grows with y, and it flushes."""
    y = tl.minimum(tl.maximum(y, -105.0, propagate_nan=tl.PropagateNan.ALL), 90.0, propagate_nan=tl.PropagateNan.ALL)
    k = (y * 1.4426950408889634 + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum is rounded to a whole number
    r = (y - k * 0.693359375) - k * -2.12194440e-4  # the first product is exact
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    power = k.to(tl.int32)
    half = power >> 1  # 2^k as two factors, because 2^k may be subnormal or infinite
    return ((p * (r * r) + r) + 1.0) * _power_of_2(half) * _power_of_2(power - half)


@triton.jit
def _power_of_2(k):
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@lru_cache(maxsize=256)
def _sizes_and_strides(shape, channels_last, *strides):
    """How the kernel orders the elements of an entry, and where it finds them in each tensor.

    Args: channels_last: number the elements in this order; otherwise in the first tensor's memory order.
    Returns: per_sample, inner_size, then three strides per tensor: entry, outer, inner.
    """
    channels, pixels = shape[1], prod(shape[2:])
    if channels_last or pixels == 1 or strides[0][1] < strides[0][-1]:
        inner, inner_size, outer, outer_size = 1, channels, -1, pixels
    else:
        inner, inner_size, outer, outer_size = -1, pixels, 1, channels
    # the stride of a dimension of size 1 does not matter: use that of dense memory
    triples = [(s[0], s[outer] if outer_size > 1 else inner_size, s[inner] if inner_size > 1 else 1) for s in strides]
    if all(along == [inner_size, 1] for _, *along in triples):
        inner_size, triples = None, [(entry, None, None) for entry, _, _ in triples]
    return channels * pixels, inner_size, *chain.from_iterable(triples)


def launch_predict_step(x_prev, x_0, x, m, v, z, rows, at, address, *, predicts, sampler, clip, learned):
    """Launches only: fastddpm.ops has checked every argument, and x_0 has the strides of x_prev."""
    strides = [tensor.stride() for tensor in (x_prev, x, m, x if v is None else v, x if z is None else z)]
    sizes = _sizes_and_strides(x.shape, address is not None, *strides)  # noise is numbered channels-last
    clip = None if clip is None else float(clip)
    grid, tensors = (len(x), triton.cdiv(sizes[0], BLOCK)), (x_prev, x_0, x, m, v, z, rows, at, address)
    constants = {"PREDICTS": predicts, "SAMPLER": sampler, "LEARNED": learned, "BLOCK": BLOCK}
    options = OPTIONS if address is None or sizes[1] is None else CROSSING
    with torch.cuda.device_of(x):
        launch(predict_step_kernel, grid, *tensors, clip, *sizes, **constants, **options)
