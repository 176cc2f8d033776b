"""Fused residual h = ((h + residual) + bias) / scale, in place: reads h and residual, writes h.

Traffic: 3 times the element size: 6 bytes per element in bf16.
Precision: all arithmetic in fp32 in the written order, rounded once.
Spec: the same in torch, bit for bit. Proof: tests/ops/test_residual.py (bits), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .launch import launch

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # 8 elements per thread: 16 bytes of bf16


@triton.jit
def residual_kernel(
    h_ptr,  # [N, per_sample] fp32, bf16 or fp16, channels-last; updated in place
    residual_ptr,  # like h
    bias_ptr,  # [channels] fp32, or None
    per_sample,
    channels,
    blocks,  # of a sample
    scale,
    SCALE: tl.constexpr,  # whether scale is not 1
    BLOCK: tl.constexpr,
):
    n = (tl.program_id(0) // blocks).to(tl.int64)  # axis 0: axes 1 and 2 stop at 65,535
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = offs < per_sample
    at = n * per_sample + offs
    h = tl.load(h_ptr + at, mask=mask).to(tl.float32) + tl.load(residual_ptr + at, mask=mask).to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + offs % channels)
    if SCALE:
        h = tl.div_rn(h, scale)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=mask)


def launch_residual(h, residual, bias, scale):
    """Launches only: fastddpm.ops has checked every argument."""
    per_sample = h.shape[1:].numel()
    blocks = triton.cdiv(per_sample, BLOCK)
    with torch.cuda.device_of(h):
        sizes, constants = (per_sample, h.shape[1], blocks), {"SCALE": scale != 1, "BLOCK": BLOCK, **OPTIONS}
        launch(residual_kernel, (len(h) * blocks,), h, residual, bias, *sizes, float(scale), **constants)
