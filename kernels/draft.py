"""Drafts the states of the next rows of each chain, for sampling parallel in time: one program loops over the rows.

Traffic: 12 bytes per element of a chain; for each row 8 to read, 4 to write, and those of the copy. The noise of all
rows is made in registers.
Precision: all arithmetic in fp32 in the written order; the copy is rounded once.
Spec: fastddpm/reference/parallel.py::draft with fastddpm/core/noise.py, stream 0.
Proof: tests/ops/test_parallel_steps.py (bits), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .block import block_of_entry
from .columns import CM, CX, HI, LO, STEP_COLUMNS
from .launch import launch
from .step import reverse_step

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def draft_kernel(
    states_ptr,  # [G * W, per_sample] fp32, channels-last; slot i mod W of a chain holds row i
    copy_ptr,  # like states in any float dtype: the network's input; or None
    x_ptr,  # [G, per_sample] fp32: the states of the chains
    m_ptr,  # like states: the network's outputs of the last round
    row_ptr,  # [S, 14] fp32: a step table, see columns.py
    scale_ptr,  # [S] fp32: of x_0
    t_ptr,  # [S] int32: the t of the noise
    pos_ptr,  # [G] int32: the row that each chain is at; -1: it is finished
    seen_ptr,  # [G] int32: the lowest row of the last round
    address_ptr,  # [G, 2] int64: (seed, sample index)
    per_sample,
    window,
    ahead,
    last_row,
    CLIP: tl.constexpr,
    ROUND: tl.constexpr,  # round the copy to bf16 first, whatever its dtype
    BLOCK: tl.constexpr,
):
    g, block, at, mask = block_of_entry(per_sample, BLOCK)
    offs, first = block * BLOCK + tl.arange(0, BLOCK), g * window
    pos, seen = tl.load(pos_ptr + g), tl.load(seen_ptr + g)

    row = tl.minimum(pos + 1, last_row)
    place = (first + row % window) * per_sample + offs
    old, m = tl.load(states_ptr + place, mask=mask), tl.load(m_ptr + place, mask=mask)
    x_0 = tl.where(pos + 1 >= seen, _predicted_x_0(old, m, row, row_ptr, scale_ptr), 0.0)

    x = tl.load(x_ptr + at, mask=mask)
    for i in range(tl.minimum(ahead, pos + 1)):
        row = pos - i
        place = (first + row % window) * per_sample + offs
        columns = row_ptr + row * STEP_COLUMNS
        of_x, of_m = tl.load(columns + CX), tl.load(columns + CM)
        kept = tl.full([BLOCK], float("inf"), tl.float32)
        if row >= seen:
            old, m = tl.load(states_ptr + place, mask=mask), tl.load(m_ptr + place, mask=mask)
            kept = m + tl.div_rn(of_x, of_m) * (old - x)
            x_0 = tl.where(tl.abs(kept) < float("inf"), _predicted_x_0(old, m, row, row_ptr, scale_ptr), x_0)
        guess = tl.div_rn(tl.div_rn(x_0, tl.load(scale_ptr + row)) - of_x * x, of_m)
        guess = tl.where(tl.abs(kept) < float("inf"), kept, guess)  # a network may overflow on a poor draft
        tl.store(states_ptr + place, x, mask=mask)
        if copy_ptr is not None:
            read = x.to(tl.bfloat16) if ROUND else x
            tl.store(copy_ptr + place, read.to(copy_ptr.dtype.element_ty), mask=mask)
        x = reverse_step(x, guess, g, row, block, row_ptr, t_ptr, address_ptr, CLIP, BLOCK)


@triton.jit
def _predicted_x_0(x, m, row, row_ptr, scale_ptr):
    """scale clamp(cx x + cm m, lo, hi)."""
    columns = row_ptr + row * STEP_COLUMNS
    x_0 = tl.load(columns + CX) * x + tl.load(columns + CM) * m
    x_0 = tl.maximum(x_0, tl.load(columns + LO), propagate_nan=tl.PropagateNan.ALL)
    x_0 = tl.minimum(x_0, tl.load(columns + HI), propagate_nan=tl.PropagateNan.ALL)
    return tl.load(scale_ptr + row) * x_0


def launch_draft(states, copy, x, m, rows, scale, timesteps, pos, seen, address, *, ahead, clip, rounded):
    """Launches only: fastddpm.ops has checked every argument."""
    per_sample, window = x.shape[1:].numel(), len(states) // len(x)
    with torch.cuda.device_of(x):
        grid, sizes = (len(x), triton.cdiv(per_sample, BLOCK)), (per_sample, window, ahead, len(rows) - 1)
        tensors = states, copy, x, m, rows, scale, timesteps, pos, seen, address
        launch(draft_kernel, grid, *tensors, *sizes, CLIP=clip, ROUND=rounded, BLOCK=BLOCK, **OPTIONS)
