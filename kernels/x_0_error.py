"""Squared error of the predicted x_0, for the variational bound: reads x_0 and m; x_t and eps are made in registers.

Traffic: the element sizes of x_0 and m: 3 bytes per element from uint8 with m in bf16.
Precision: all arithmetic in fp32 in the written order, sums as a binary tree.
Spec: fastddpm/reference/diffusion.py::squared_error of ::predicted_x_0 and ::add_noise with fastddpm/core/noise.py.
Proof: tests/ops/test_x_0_error.py (bits), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .block import block_of_entry
from .columns import (
    NOISE,
    PREDICTED_CM,
    PREDICTED_CX,
    PREDICTED_HI,
    PREDICTED_LO,
    PREDICTED_SCALE,
    SIGNAL,
    X_0_ERROR_COLUMNS,
)
from .launch import launch
from .noising import data_units, eps_of
from .tree import launch_tree_sum, tree_sum

BLOCK = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}  # 16 elements per thread: uint8 is read 16 bytes at a time


@triton.jit
def x_0_error_kernel(
    out_ptr,  # [N, blocks] fp32: the squared errors of each block, summed
    m_ptr,  # [N, per_sample] fp32, bf16 or fp16, channels-last
    x_0_ptr,  # like m: uint8, fp32, bf16 or fp16
    t_ptr,  # [N] int64: timestep of each entry
    address_ptr,  # [N, 2] int64: (seed, sample index) of each entry
    table_ptr,  # [T, 7] fp32: sqrt(abar_t), sqrt(1 - abar_t), cx, cm, lo, hi, scale
    per_sample,
    STREAM: tl.constexpr,
    WITH_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, block, at, mask = block_of_entry(per_sample, BLOCK)

    m = tl.load(m_ptr + at, mask=mask).to(tl.float32)
    x_0 = data_units(tl.load(x_0_ptr + at, mask=mask))
    t = tl.load(t_ptr + n)
    row = table_ptr + t * X_0_ERROR_COLUMNS
    eps = eps_of(n, t, block, address_ptr, STREAM, WITH_T, BLOCK)
    x_t = tl.load(row + SIGNAL) * x_0 + tl.load(row + NOISE) * eps
    w = tl.load(row + PREDICTED_CX) * x_t + tl.load(row + PREDICTED_CM) * m
    w = tl.maximum(w, tl.load(row + PREDICTED_LO), propagate_nan=tl.PropagateNan.ALL)
    w = tl.minimum(w, tl.load(row + PREDICTED_HI), propagate_nan=tl.PropagateNan.ALL)
    d = tl.load(row + PREDICTED_SCALE) * w - x_0
    tl.store(out_ptr + n * tl.num_programs(1) + block, tree_sum(tl.where(mask, d * d, 0.0), BLOCK))


def launch_x_0_error(m, x_0, t, address, table, *, stream, with_t):
    """Return [N] fp32. Launches only: fastddpm.ops has checked every argument."""
    per_sample = m.shape[1:].numel()
    blocks = m.new_empty(len(m), triton.cdiv(per_sample, BLOCK), dtype=torch.float32)
    constants = {"STREAM": stream, "WITH_T": with_t, "BLOCK": BLOCK, **OPTIONS}
    with torch.cuda.device_of(m):
        launch(x_0_error_kernel, tuple(blocks.shape), blocks, m, x_0, t, address, table, per_sample, **constants)
        return launch_tree_sum(blocks)
