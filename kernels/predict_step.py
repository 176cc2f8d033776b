"""Fused prediction and reverse step of diffusers' schedulers: reads x, m, if need be v and z, writes x_prev and x_0.

Traffic: the element sizes of what is read and written: 16 bytes per element in fp32 with z made in registers, 20 with z
given. 16-byte accesses where all tensors have one dense order, each with a stride of its own from entry to entry.
Precision: all arithmetic in fp32 in the written order, exact roundings only; x_prev and x_0 are rounded once.
Spec: reference/diffusion.py::predict_step with core/noise.py, stream 0. Proof: tests/ops/test_predict_step.py
(bits; the exponential of learned_range against float64), tests/kernels/test_compiled.py,
tests/sampling/test_gpu.py.
"""

from functools import lru_cache
from itertools import chain
from math import prod

import torch
import triton
import triton.language as tl

from .launch import launch
from .philox import normals

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # 8 elements per thread: 16 bytes of bf16


@triton.jit(do_not_specialize=["at"])  # a new row is no new kernel
def predict_step_kernel(
    x_prev_ptr,  # [N, C, P] fp32, bf16 or fp16
    x_0_ptr,  # like x_prev, in a dtype of its own
    x_ptr,  # [N, C, P] in dtypes and strides of their own, as m, v and z
    m_ptr,  # what the network returned
    v_ptr,  # what it returned for the variance, or None
    z_ptr,  # standard normal, or None
    row_ptr,  # [R, 8] fp32: signal, noise, of_x_0, of_w, sigma, log_min, log_max, noisy
    at,  # the row, an integer, or where it lies, int64; row i is of timestep i - 1
    address_ptr,  # [N, 2] int64: (seed, sample index) of each entry, or None
    clip,  # x_0 is kept within +-clip; or None
    per_sample,
    inner,  # C or P, whichever is innermost in the order of the elements; None: the order of the memory
    x_prev_entry,  # strides from entry to entry,
    x_prev_outer,  # along P or C,
    x_prev_inner,  # along C or P
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
    row = row_ptr + at.to(tl.int64) * 8

    x = tl.load(x_ptr + _place(n, offs, inner, x_entry, x_outer, x_inner), mask=mask, other=0).to(tl.float32)
    m = tl.load(m_ptr + _place(n, offs, inner, m_entry, m_outer, m_inner), mask=mask, other=0).to(tl.float32)
    if v_ptr is not None:
        v = tl.load(v_ptr + _place(n, offs, inner, v_entry, v_outer, v_inner), mask=mask, other=0).to(tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + _place(n, offs, inner, z_entry, z_outer, z_inner), mask=mask, other=0).to(tl.float32)
    signal, noise = tl.load(row), tl.load(row + 1)

    if PREDICTS == "epsilon":  # the order of operations is the specification: results are compared bit for bit
        x_0 = tl.div_rn(x - noise * m, signal)
    elif PREDICTS == "sample":
        x_0 = m
    else:
        x_0 = signal * x - noise * m
    if clip is not None:
        x_0 = tl.maximum(x_0, -clip, propagate_nan=tl.PropagateNan.ALL)
        x_0 = tl.minimum(x_0, clip, propagate_nan=tl.PropagateNan.ALL)
    place = _place(n, offs, inner, x_prev_entry, x_prev_outer, x_prev_inner)
    tl.store(x_0_ptr + place, x_0.to(x_0_ptr.dtype.element_ty), mask=mask)

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
    x_prev = tl.load(row + 2) * x_0 + tl.load(row + 3) * w

    if z_ptr is not None or address_ptr is not None:
        noisy = tl.load(row + 7)
        if noisy != 0:
            if z_ptr is None:
                seed, sample = tl.load(address_ptr + 2 * n), tl.load(address_ptr + 2 * n + 1)
                z = normals(seed, 0, sample, at - 1, block, BLOCK)
            if LEARNED is None:
                scale = tl.load(row + 4)
            elif LEARNED == "learned":
                scale = tl.sqrt_rn(v)
            else:
                share = (v + 1) * 0.5
                log_var = share * tl.load(row + 6) + (1 - share) * tl.load(row + 5)
                scale = _exp(0.5 * log_var)
            x_prev += scale * z

    tl.store(x_prev_ptr + place, x_prev.to(x_prev_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _place(n, offs, size, entry, outer, inner):
    """Where the elements of entry n lie, in 64 bits."""
    if size is None:
        return n * entry + offs
    else:
        return n * entry + (offs // size).to(tl.int64) * outer + (offs % size).to(tl.int64) * inner


@triton.jit
def _exp(y):
    """e^y within an ulp (coefficients from Cephes, S. Moshier); tl.exp has an error that grows with y, and flushes."""
    y = tl.minimum(tl.maximum(y, -105.0, propagate_nan=tl.PropagateNan.ALL), 90.0, propagate_nan=tl.PropagateNan.ALL)
    k = (y * 1.4426950408889634 + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum is rounded to a whole number
    r = (y - k * 0.693359375) - k * -2.12194440e-4  # the first product is exact
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    power = k.to(tl.int32)
    half = power >> 1  # 2^k in two factors: by itself it may be no normal number
    return ((p * (r * r) + r) + 1.0) * _power_of_2(half) * _power_of_2(power - half)


@triton.jit
def _power_of_2(k):
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@lru_cache(maxsize=256)
def _counted(shape, channels_last, *strides):
    """How the kernel counts the elements of an entry and finds them: per_sample, inner, then three strides per tensor.

    Args: channels_last: whether elements are counted in this order, or in that of the first tensor's memory.
    """
    channels, pixels = shape[1], prod(shape[2:])
    if channels_last or pixels == 1 or strides[0][1] < strides[0][-1]:
        inner, size, outer, others = 1, channels, -1, pixels
    else:
        inner, size, outer, others = -1, pixels, 1, channels
    # what a stride along a dimension of one element is does not matter
    found = [(s[0], s[outer] if others > 1 else size, s[inner] if size > 1 else 1) for s in strides]
    if all(rest == [size, 1] for _, *rest in found):
        size, found = None, [(entry, None, None) for entry, _, _ in found]
    return channels * pixels, size, *chain.from_iterable(found)


def launch_predict_step(x_prev, x_0, x, m, v, z, rows, at, address, *, predicts, sampler, clip, learned):
    """Launch only; fastddpm.ops has checked every argument, and x_0 has the strides of x_prev."""
    strides = [tensor.stride() for tensor in (x_prev, x, m, x if v is None else v, x if z is None else z)]
    sizes = _counted(x.shape, address is not None, *strides)  # of noise, elements are counted channels-last
    how = {"PREDICTS": predicts, "SAMPLER": sampler, "LEARNED": learned, "BLOCK": BLOCK}
    with torch.cuda.device_of(x):
        grid, tensors = (len(x), triton.cdiv(sizes[0], BLOCK)), (x_prev, x_0, x, m, v, z, rows, at, address)
        launch(predict_step_kernel, grid, *tensors, None if clip is None else float(clip), *sizes, **how, **OPTIONS)
