"""Fused forward noising x_0 -> x_t: reads x_0, writes x_t in the network's dtype; eps is made in registers.

Traffic: the element sizes of x_0 and x_t: 3 bytes per element from uint8 to bf16.
Precision: all arithmetic in fp32 in the written order, uint8 widened as (u - 127.5) * (2 / 255); rounded once.
Spec: fastddpm/reference/diffusion.py::add_noise with fastddpm/core/noise.py.
Proof: tests/ops/test_noising.py (bits), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .block import block_of_entry
from .columns import NOISE, NOISING_COLUMNS, SIGNAL
from .launch import launch
from .philox import entry_normals

BLOCK = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}  # 16 elements per thread: uint8 is read 16 bytes at a time


@triton.jit
def data_units(x):
    """x in fp32; the bytes 0..255 become [-1, 1]."""
    value = x.to(tl.float32)
    return (value - 127.5) * (2 / 255) if x.dtype == tl.uint8 else value


@triton.jit
def eps_of(n, t, block, address_ptr, STREAM: tl.constexpr, WITH_T: tl.constexpr, BLOCK: tl.constexpr):
    """The noise that noising adds to a block of entry n at t: [BLOCK] fp32. WITH_T: whether its address contains t."""
    return entry_normals(n, STREAM, t if WITH_T else t * 0, block, address_ptr, BLOCK)


@triton.jit
def noising_kernel(
    x_t_ptr,  # [N, per_sample] fp32, bf16 or fp16, channels-last
    x_0_ptr,  # like x_t: uint8, fp32, bf16 or fp16
    t_ptr,  # [N] int64: timestep of each entry
    address_ptr,  # [N, 2] int64: (seed, sample index) of each entry
    table_ptr,  # [T, 2] fp32: sqrt(abar_t), sqrt(1 - abar_t)
    per_sample,
    STREAM: tl.constexpr,
    WITH_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, block, at, mask = block_of_entry(per_sample, BLOCK)

    x_0 = data_units(tl.load(x_0_ptr + at, mask=mask))
    t = tl.load(t_ptr + n)
    eps = eps_of(n, t, block, address_ptr, STREAM, WITH_T, BLOCK)
    row = table_ptr + t * NOISING_COLUMNS
    x_t = tl.load(row + SIGNAL) * x_0 + tl.load(row + NOISE) * eps
    tl.store(x_t_ptr + at, x_t.to(x_t_ptr.dtype.element_ty), mask=mask)


def launch_noising(x_t, x_0, t, address, table, *, stream, with_t):
    """Launches only: fastddpm.ops has checked every argument."""
    per_sample = x_0.shape[1:].numel()
    with torch.cuda.device_of(x_0):
        grid, tensors = (len(x_0), triton.cdiv(per_sample, BLOCK)), (x_t, x_0, t, address, table)
        launch(noising_kernel, grid, *tensors, per_sample, STREAM=stream, WITH_T=with_t, BLOCK=BLOCK, **OPTIONS)
