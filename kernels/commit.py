"""Takes the exact steps of each chain, as many as its drafts allow, for sampling parallel in time.

Traffic: 8 bytes per element of a chain, and 4 for each step.
Precision: all arithmetic in fp32 in the written order.
Faults: as in step.py.
Spec: fastddpm/reference/parallel.py::commit with fastddpm/core/noise.py, stream 0.
Proof: tests/ops/test_parallel_steps.py (bits), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .block import block_of_entry
from .launch import launch
from .step import flag, reverse_step

BLOCK = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}  # 16 elements per thread, as `flag` wants them


@triton.jit
def commit_kernel(
    x_ptr,  # [G, per_sample] fp32, channels-last: the states of the chains; updated in place
    m_ptr,  # [G * W, per_sample] fp32: the network's outputs; slot i mod W of a chain holds row i
    row_ptr,  # [S, 14] fp32: a step table, see columns.py
    t_ptr,  # [S] int32: the t of the noise
    pos_ptr,  # [G] int32: the row that each chain is at; -1: it is finished
    reached_ptr,  # [G] int32: the row that it goes to
    address_ptr,  # [G, 2] int64: (seed, sample index)
    bad_ptr,  # [G] int32, or None
    per_sample,
    window,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    g, block, at, mask = block_of_entry(per_sample, BLOCK)
    offs, first = block * BLOCK + tl.arange(0, BLOCK), g * window
    pos = tl.load(pos_ptr + g)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)  # the flag needs finite values beyond the sample
    for i in range(pos - tl.load(reached_ptr + g)):
        row = pos - i
        place = (first + row % window) * per_sample + offs
        m = tl.load(m_ptr + place, mask=mask, other=0.0)
        x = reverse_step(x, m, g, row, block, row_ptr, t_ptr, address_ptr, CLIP, BLOCK)
        if bad_ptr is not None:
            flag(bad_ptr + g, row, x, 4, BLOCK)
    tl.store(x_ptr + at, x, mask=mask)


def launch_commit(x, m, rows, timesteps, pos, reached, address, bad, *, clip):
    """Launches only: fastddpm.ops has checked every argument."""
    per_sample, window = x.shape[1:].numel(), len(m) // len(x)
    with torch.cuda.device_of(x):
        grid, tensors = (len(x), triton.cdiv(per_sample, BLOCK)), (x, m, rows, timesteps, pos, reached, address, bad)
        launch(commit_kernel, grid, *tensors, per_sample, window, CLIP=clip, BLOCK=BLOCK, **OPTIONS)
