"""The training loss and its gradient: both read m, and x_0 if the target contains it; eps is made in registers.

Traffic: the element size of m forward, twice that backward; in both also that of x_0 if the target contains it.
Together 6 bytes per element for eps prediction in bf16.
Precision: all arithmetic in fp32 in the written order, sums as a binary tree; the gradient is rounded once.
Spec: fastddpm/reference/diffusion.py::squared_error of ::target with fastddpm/core/noise.py.
Proof: tests/ops/test_eps_loss.py (bits, and the gradient against float64), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .block import block_of_entry
from .columns import NOISE, NOISING_COLUMNS, SIGNAL
from .launch import launch
from .noising import data_units, eps_of
from .tree import launch_tree_sum, tree_sum

BLOCK = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}  # 16 elements per thread: uint8 is read 16 bytes at a time


@triton.jit
def _error(
    n,
    block,
    at,
    mask,
    m_ptr,  # [N, per_sample] fp32, bf16 or fp16, channels-last
    x_0_ptr,  # like m: uint8, fp32, bf16 or fp16; not read for eps prediction
    t_ptr,  # [N] int64: timestep of each entry
    address_ptr,  # [N, 2] int64: (seed, sample index) of each entry
    table_ptr,  # [T, 2] fp32: sqrt(abar_t), sqrt(1 - abar_t); read for v prediction
    PREDICTS: tl.constexpr,
    STREAM: tl.constexpr,
    WITH_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m - target, [BLOCK] fp32."""
    m = tl.load(m_ptr + at, mask=mask).to(tl.float32)
    t = tl.load(t_ptr + n)
    if PREDICTS == "epsilon":
        return m - eps_of(n, t, block, address_ptr, STREAM, WITH_T, BLOCK)
    x_0 = data_units(tl.load(x_0_ptr + at, mask=mask))
    if PREDICTS == "sample":
        return m - x_0
    eps = eps_of(n, t, block, address_ptr, STREAM, WITH_T, BLOCK)
    row = table_ptr + t * NOISING_COLUMNS
    return m - (tl.load(row + SIGNAL) * eps - tl.load(row + NOISE) * x_0)


@triton.jit
def eps_loss_kernel(
    out_ptr,  # [N, blocks] fp32: the squared errors of each block, summed
    m_ptr,
    x_0_ptr,
    t_ptr,
    address_ptr,
    table_ptr,
    per_sample,
    PREDICTS: tl.constexpr,
    STREAM: tl.constexpr,
    WITH_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, block, at, mask = block_of_entry(per_sample, BLOCK)
    tensors = m_ptr, x_0_ptr, t_ptr, address_ptr, table_ptr
    d = _error(n, block, at, mask, *tensors, PREDICTS, STREAM, WITH_T, BLOCK)
    tl.store(out_ptr + n * tl.num_programs(1) + block, tree_sum(tl.where(mask, d * d, 0.0), BLOCK))


@triton.jit
def eps_loss_backward_kernel(
    out_ptr,  # like m: the gradient
    grad_ptr,  # [N] fp32: the gradient of each entry's loss
    m_ptr,
    x_0_ptr,
    t_ptr,
    address_ptr,
    table_ptr,
    per_sample,
    PREDICTS: tl.constexpr,
    STREAM: tl.constexpr,
    WITH_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, block, at, mask = block_of_entry(per_sample, BLOCK)
    tensors = m_ptr, x_0_ptr, t_ptr, address_ptr, table_ptr
    d = _error(n, block, at, mask, *tensors, PREDICTS, STREAM, WITH_T, BLOCK)
    tl.store(out_ptr + at, ((2 * tl.load(grad_ptr + n)) * d).to(out_ptr.dtype.element_ty), mask=mask)


def launch_eps_loss(m, x_0, t, address, table, *, predicts, stream, with_t):
    """Return [N] fp32. Launches only: fastddpm.ops has checked every argument."""
    per_sample = m.shape[1:].numel()
    blocks = m.new_empty(len(m), triton.cdiv(per_sample, BLOCK), dtype=torch.float32)
    constants = {"PREDICTS": predicts, "STREAM": stream, "WITH_T": with_t, "BLOCK": BLOCK, **OPTIONS}
    with torch.cuda.device_of(m):
        launch(eps_loss_kernel, tuple(blocks.shape), blocks, m, x_0, t, address, table, per_sample, **constants)
        return launch_tree_sum(blocks)


def launch_eps_loss_backward(out, grad, m, x_0, t, address, table, *, predicts, stream, with_t):
    """Launches only: fastddpm.ops has checked every argument."""
    per_sample = m.shape[1:].numel()
    constants = {"PREDICTS": predicts, "STREAM": stream, "WITH_T": with_t, "BLOCK": BLOCK, **OPTIONS}
    with torch.cuda.device_of(m):
        grid, tensors = (len(m), triton.cdiv(per_sample, BLOCK)), (out, grad, m, x_0, t, address, table)
        launch(eps_loss_backward_kernel, grid, *tensors, per_sample, **constants)
