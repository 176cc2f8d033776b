"""Finds the first row of each chain whose draft differs from the exact state, for sampling parallel in time.

Each program takes the exact steps of its block in registers, until the state and the draft, both rounded to bf16 as the
network reads them, differ.
Traffic: 4 bytes per element of a chain, and for each row 8 to read; an atomic per block that differs.
Precision: all arithmetic in fp32 in the written order.
Spec: fastddpm/reference/parallel.py::first_difference with fastddpm/core/noise.py, stream 0.
Proof: tests/ops/test_parallel_steps.py (bits), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .block import block_of_entry
from .launch import launch
from .step import reverse_step

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def first_difference_kernel(
    reached_ptr,  # [G] int32: raised to the highest row that differs
    x_ptr,  # [G, per_sample] fp32: the states of the chains
    states_ptr,  # [G * W, per_sample] fp32: the drafts
    m_ptr,  # like states: the network's outputs for them
    row_ptr,  # [S, 14] fp32: a step table, see columns.py
    t_ptr,  # [S] int32: the t of the noise
    pos_ptr,  # [G] int32: the row that each chain is at; -1: it is finished
    address_ptr,  # [G, 2] int64: (seed, sample index)
    per_sample,
    window,
    ahead,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    g, block, at, mask = block_of_entry(per_sample, BLOCK)
    offs, first = block * BLOCK + tl.arange(0, BLOCK), g * window
    pos = tl.load(pos_ptr + g)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    i, rows = 0, tl.minimum(ahead, pos + 1)
    while i < rows:
        row = pos - i
        place = (first + row % window) * per_sample + offs
        draft = tl.load(states_ptr + place, mask=mask, other=0.0)
        differs = mask & (_bits(x) != _bits(draft)) & (i > 0)
        if tl.max(differs.to(tl.int32), 0) != 0:
            tl.atomic_max(reached_ptr + g, row, sem="relaxed")
            i = rows
        else:
            m = tl.load(m_ptr + place, mask=mask, other=0.0)
            x = reverse_step(x, m, g, row, block, row_ptr, t_ptr, address_ptr, CLIP, BLOCK)
            i += 1


@triton.jit
def _bits(x):
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True)


def launch_first_difference(reached, x, states, m, rows, timesteps, pos, address, *, ahead, clip):
    """Launches only: fastddpm.ops has checked every argument."""
    per_sample, window = x.shape[1:].numel(), len(states) // len(x)
    with torch.cuda.device_of(x):
        grid, tensors = (len(x), triton.cdiv(per_sample, BLOCK)), (reached, x, states, m, rows, timesteps, pos, address)
        constants = {"CLIP": clip, "BLOCK": BLOCK}
        launch(first_difference_kernel, grid, *tensors, per_sample, window, ahead, **constants, **OPTIONS)
