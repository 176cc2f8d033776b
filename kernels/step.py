"""Fused reverse step x_t -> x_{t-1}: reads x and m, writes x and, if asked, a copy; z is made in registers.

Traffic: 8 bytes per element for x, plus the element sizes of m and of the copy: 10 bytes with m in bf16.
Precision: all arithmetic in fp32 in the written order; the copy is rounded once.
Faults: bad[n] keeps the highest position at which entry n got a value that is not finite; it costs a maximum per
element and an atomic per 16 of them where one is bad, no barrier and no synchronisation.
Spec: reference/diffusion.py::update with core/noise.py, stream 0. Proof: tests/kernels/test_kernels.py (bits),
tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .launch import launch
from .philox import normals

BLOCK = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}  # 16 elements per thread: the work per slot and thread is shared


@triton.jit
def step_kernel(
    x_ptr,  # [N, per_sample] fp32, channels-last; updated in place
    m_ptr,  # like x, the network's dtype
    row_ptr,  # [S, 8] fp32: schedule.COLUMNS
    t_ptr,  # [S] int32: training timestep of each row
    pos_ptr,  # [N] int32: the row each entry is at; one captured graph serves all steps
    address_ptr,  # [N, 2] int64: (seed, sample index) of each entry
    copy_ptr,  # like x in bf16 or fp16, or None
    bad_ptr,  # [N] int32, or None
    per_sample,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # axis 0: axes 1 and 2 stop at 65,535
    block = tl.program_id(1)
    offs = tl.arange(0, BLOCK)
    mask = offs < per_sample - block * BLOCK
    at = n * per_sample + block * BLOCK + offs

    x = tl.load(x_ptr + at, mask=mask, other=0.0)  # beyond the sample all is finite
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
    pos = tl.load(pos_ptr + n)
    row = row_ptr + pos * 8
    B, C = tl.load(row + 5), tl.load(row + 6)

    if CLIP:  # the order of operations is the specification: results are compared bit for bit
        x_0 = tl.load(row) * x + tl.load(row + 1) * m
        x_0 = tl.maximum(x_0, tl.load(row + 2), propagate_nan=tl.PropagateNan.ALL)
        x_0 = tl.minimum(x_0, tl.load(row + 3), propagate_nan=tl.PropagateNan.ALL)
        x_prev = (tl.load(row + 4) * x_0 + B * x) + C * m
    else:
        x_prev = B * x + C * m
    S = tl.load(row + 7)  # here: loaded with B and C it costs sm_100 a spill
    if S != 0:
        seed, sample = tl.load(address_ptr + 2 * n), tl.load(address_ptr + 2 * n + 1)
        x_prev += S * normals(seed, 0, sample, tl.load(t_ptr + pos), block, BLOCK)

    tl.store(x_ptr + at, x_prev, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + at, x_prev.to(copy_ptr.dtype.element_ty), mask=mask)
    if bad_ptr is not None:
        worst = tl.reshape(tl.abs(x_prev), (BLOCK // 16, 16), can_reorder=True)  # any 16, such as a thread's own
        for i in tl.static_range(4):
            a, b = tl.split(worst.reshape(BLOCK // 16, 8 >> i, 2))
            worst = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
        entry = tl.broadcast_to(bad_ptr + n, worst.shape)
        tl.atomic_max(entry, pos, mask=~(worst < float("inf")), sem="relaxed")


def launch_step(x, m, rows, timesteps, pos, address, copy, bad, *, clip):
    """Launch only; fastddpm.ops has checked every argument."""
    per_sample = x.shape[1:].numel()
    with torch.cuda.device_of(x):
        grid, tensors = (len(x), triton.cdiv(per_sample, BLOCK)), (x, m, rows, timesteps, pos, address, copy, bad)
        launch(step_kernel, grid, *tensors, per_sample, CLIP=clip, BLOCK=BLOCK, **OPTIONS)
