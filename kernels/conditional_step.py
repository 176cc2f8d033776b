"""Fused reverse step x_t -> x_{t-1} of a conditional network: guidance, learned variances, known parts of x_0.

Traffic: 8 bytes per element for x, plus all elements of m: twice as many with guidance, and again for learned
variances; 5 bytes for known parts. Both kinds of noise are made in registers.
Precision: all arithmetic in fp32 in the written order.
Faults: as in step.py.
Spec: fastddpm/reference/diffusion.py::update, guided, deviation, replaced; noise of streams 0 and 4.
Proof: tests/ops/test_conditional_step.py (bits), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .block import block_of_entry
from .columns import STEP_COLUMNS, B, C, L, P, Q, S, V
from .launch import launch
from .philox import KNOWN_STREAM, STEP_STREAM, entry_normals
from .step import flag, mean

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def conditional_step_kernel(
    x_ptr,  # [N, per_sample] fp32, channels-last; updated in place
    m_ptr,  # [N or 2N, pixels, 1 or 2, channels], the network's dtype
    row_ptr,  # [S, 14] fp32: a step table, see columns.py
    t_ptr,  # [S] int32: training timestep of each row, the t of the noise
    pos_ptr,  # [N] int32: the row each entry is at
    address_ptr,  # [N, 2] int64: (seed, sample index) of each entry
    guidance_ptr,  # [N] fp32, or None
    known_ptr,  # like x, or None
    mask_ptr,  # like x in int8, or None: where known replaces x
    bad_ptr,  # [N] int32, or None
    per_sample,
    channels,
    HALVES: tl.constexpr,  # 1, or 2 if m has a second half of channels
    CLIP: tl.constexpr,
    GUIDE_VARIANCE: tl.constexpr,
    LEARNED: tl.constexpr,  # 0, 1: the variance itself, 2: an interpolation
    BLOCK: tl.constexpr,
):
    n, block, at, mask = block_of_entry(per_sample, BLOCK)

    x = tl.load(x_ptr + at, mask=mask, other=0.0)  # the flag needs finite values beyond the sample
    place = block * BLOCK + tl.arange(0, BLOCK)
    if HALVES == 2:
        place += place // channels * channels
    outputs = m_ptr + n * per_sample * HALVES
    without = outputs + tl.num_programs(0).to(tl.int64) * per_sample * HALVES  # the outputs without the condition
    m = tl.load(outputs + place, mask=mask, other=0.0).to(tl.float32)
    if guidance_ptr is not None:
        m = _guided(m, tl.load(without + place, mask=mask, other=0.0), guidance_ptr + n)

    pos = tl.load(pos_ptr + n)
    row, t = row_ptr + pos * STEP_COLUMNS, tl.load(t_ptr + pos)
    x_prev = mean(x, m, row, tl.load(row + B), tl.load(row + C), CLIP)
    sigma = tl.load(row + S)
    if sigma != 0:
        z = entry_normals(n, STEP_STREAM, t, block, address_ptr, BLOCK)
        if LEARNED:
            v = tl.load(outputs + place + channels, mask=mask, other=0.0).to(tl.float32)
            if guidance_ptr is not None and GUIDE_VARIANCE:
                v = _guided(v, tl.load(without + place + channels, mask=mask, other=0.0), guidance_ptr + n)
            if LEARNED == 1:
                x_prev += (sigma * tl.sqrt_rn(v)) * z
            else:
                x_prev += (sigma * exponential(tl.load(row + L) + tl.load(row + V) * v)) * z
        else:
            x_prev += sigma * z

    if known_ptr is not None:
        known = tl.load(row + P) * tl.load(known_ptr + at, mask=mask, other=0.0)
        noise = tl.load(row + Q)
        if noise != 0:
            known += noise * entry_normals(n, KNOWN_STREAM, t, block, address_ptr, BLOCK)
        x_prev = tl.where(tl.load(mask_ptr + at, mask=mask, other=0) != 0, known, x_prev)

    tl.store(x_ptr + at, x_prev, mask=mask)
    if bad_ptr is not None:
        flag(bad_ptr + n, pos, x_prev, 4, BLOCK)


@triton.jit
def _guided(m_c, m_u, scale_ptr):
    """Classifier-free guidance. Args: m_c in fp32; m_u in the network's dtype."""
    m_u = m_u.to(tl.float32)
    return m_u + tl.load(scale_ptr) * (m_c - m_u)


@triton.jit
def exponential(a):
    """exp(a), in the operations of the specification."""
    a = tl.where(a < -120.0, -120.0, tl.where(a > 120.0, 120.0, a))  # NaN stays NaN
    shifted = a * 1.44269504 + 12582912.0
    whole = shifted - 12582912.0
    r = (a - whole * 0.693145752) - whole * 1.42860677e-6
    p = r * 1.97903e-4 + 1.3944703e-3
    p = p * r + 8.333498e-3
    p = p * r + 4.1666295e-2
    p = p * r + 1.6666666e-1
    p = p * r + 0.5
    k = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    first = (((k >> 1) + 127) << 23).to(tl.float32, bitcast=True)
    second = ((k - (k >> 1) + 127) << 23).to(tl.float32, bitcast=True)
    return ((p * (r * r) + r) + 1.0) * first * second


def launch_conditional_step(
    x, m, rows, timesteps, pos, address, guidance, known, mask, bad, *, clip, guide_variance, learned
):
    """Launches only: fastddpm.ops has checked every argument."""
    per_sample, channels = x.shape[1:].numel(), x.shape[1]
    mask = None if mask is None else mask.view(torch.int8)
    with torch.cuda.device_of(x):
        grid = len(x), triton.cdiv(per_sample, BLOCK)
        tensors = x, m, rows, timesteps, pos, address, guidance, known, mask, bad
        flags = {"CLIP": clip, "GUIDE_VARIANCE": guide_variance, "LEARNED": learned, "BLOCK": BLOCK}
        flags |= {"HALVES": m.shape[1] // channels}
        launch(conditional_step_kernel, grid, *tensors, per_sample, channels, **flags, **OPTIONS)
