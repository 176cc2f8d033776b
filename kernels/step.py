"""Fused reverse step x_t -> x_{t-1}: reads x and m, writes x and optionally a copy; z is made in registers.

Traffic: 8 bytes per element for x, plus the element sizes of m and of the copy: 10 bytes with m in bf16.
Precision: all arithmetic in fp32 in the written order; the copy is rounded once.
Faults: bad[n] keeps the highest position at which entry n got a value that is not finite. This costs a maximum per
element, and an atomic for each 16 elements that hold such a value, but no barrier and no synchronisation.
Spec: fastddpm/reference/diffusion.py::update with fastddpm/core/noise.py, stream 0.
Proof: tests/ops/test_step.py (bits), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .block import block_of_entry
from .columns import CM, CX, HI, LO, STEP_COLUMNS, A, B, C, S
from .launch import launch
from .philox import STEP_STREAM, entry_normals

BLOCK = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}  # 16 elements per thread share the work per entry


@triton.jit
def step_kernel(
    x_ptr,  # [N, per_sample] fp32, channels-last; updated in place
    m_ptr,  # like x, the network's dtype
    row_ptr,  # [S, 14] fp32: a step table, see columns.py
    t_ptr,  # [S] int32: training timestep of each row
    pos_ptr,  # [N] int32: the row each entry is at; one captured graph serves all steps
    address_ptr,  # [N, 2] int64: (seed, sample index) of each entry
    copy_ptr,  # like x in bf16 or fp16, or None
    bad_ptr,  # [N] int32, or None
    per_sample,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, block, at, mask = block_of_entry(per_sample, BLOCK)

    x = tl.load(x_ptr + at, mask=mask, other=0.0)  # the flag needs finite values beyond the sample
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
    pos = tl.load(pos_ptr + n)
    x_prev = reverse_step(x, m, n, pos, block, row_ptr, t_ptr, address_ptr, CLIP, BLOCK)

    tl.store(x_ptr + at, x_prev, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + at, x_prev.to(copy_ptr.dtype.element_ty), mask=mask)
    if bad_ptr is not None:
        # a thread holds as many adjacent elements as fit in 16 bytes of m
        flag(bad_ptr + n, pos, x_prev, 128 // m_ptr.dtype.element_ty.primitive_bitwidth, BLOCK)


@triton.jit
def reverse_step(x, m, n, pos, block, row_ptr, t_ptr, address_ptr, CLIP: tl.constexpr, BLOCK: tl.constexpr):
    """x_{t-1} of one block of the sample that has address n, from its state x at row pos."""
    row = row_ptr + pos * STEP_COLUMNS
    of_x, of_m = tl.load(row + B), tl.load(row + C)
    x_prev = mean(x, m, row, of_x, of_m, CLIP)
    sigma = tl.load(row + S)  # loaded here because sm_100 spills if it is loaded with B and C
    if sigma != 0:
        x_prev += sigma * entry_normals(n, STEP_STREAM, tl.load(t_ptr + pos), block, address_ptr, BLOCK)
    return x_prev


@triton.jit
def mean(x, m, row, of_x, of_m, CLIP: tl.constexpr):
    """x_{t-1} without its noise. Args: row: a pointer to a row; of_x, of_m: its columns B and C."""
    if CLIP:  # the order of operations is the specification: results are compared bit for bit
        x_0 = tl.load(row + CX) * x + tl.load(row + CM) * m
        x_0 = tl.maximum(x_0, tl.load(row + LO), propagate_nan=tl.PropagateNan.ALL)
        x_0 = tl.minimum(x_0, tl.load(row + HI), propagate_nan=tl.PropagateNan.ALL)
        x_prev = (tl.load(row + A) * x_0 + of_x * x) + of_m * m
    else:
        x_prev = of_x * x + of_m * m
    return x_prev


@triton.jit
def flag(bad_ptr, pos, x_prev, adjacent: tl.constexpr, BLOCK: tl.constexpr):
    """Raise a flag to pos if a value is not finite. Args: adjacent: how many of a thread's elements are, in memory."""
    worst = tl.abs(x_prev).reshape(16 // adjacent, BLOCK // 16, adjacent)
    worst = worst.permute(1, 0, 2).reshape(BLOCK // 16, 16)
    for i in tl.static_range(4):
        a, b = tl.split(worst.reshape(BLOCK // 16, 8 >> i, 2))
        worst = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    entry = tl.broadcast_to(bad_ptr, worst.shape)
    tl.atomic_max(entry, pos, mask=~(worst < float("inf")), sem="relaxed")


def launch_step(x, m, rows, timesteps, pos, address, copy, bad, *, clip):
    """Launches only: fastddpm.ops has checked every argument."""
    per_sample = x.shape[1:].numel()
    with torch.cuda.device_of(x):
        grid, tensors = (len(x), triton.cdiv(per_sample, BLOCK)), (x, m, rows, timesteps, pos, address, copy, bad)
        launch(step_kernel, grid, *tensors, per_sample, CLIP=clip, BLOCK=BLOCK, **OPTIONS)
