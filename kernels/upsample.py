"""Interleave: the four phases of an upsampled image become its pixels, with a bias.

Traffic: each element of the result is read once and written once: 4 bytes in bf16.
Precision: the sum in fp32, rounded once; without a bias the bits are copied.
Spec: the same in torch, bit for bit. Proof: tests/test_upsample.py (bits), tests/test_compiled.py (machine code).
"""

import torch
import triton
import triton.language as tl

from .launch import launch

BLOCK = 2048
MAX_CHANNELS = 64  # of a block: 128 bytes of bf16, a cache line
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # 16 elements per thread: 16 bytes of bf16 from two pixels each


@triton.jit(do_not_specialize=["height", "width"])  # one kernel for all levels of a network
def interleave_kernel(
    out_ptr,  # [N, 2 height, 2 width, channels] like y
    y_ptr,  # [N, height + 1, width + 1, 4 channels] fp32, bf16 or fp16
    bias_ptr,  # [channels] fp32, or None
    height,  # of the small image
    width,
    channels,
    CHANNELS: tl.constexpr,  # of a block, a power of two
    PIXELS: tl.constexpr,  # of a block, a power of two
    STRIPES: tl.constexpr,  # blocks side by side, for all channels
):
    pixels = 4 * height * width
    blocks = tl.cdiv(pixels, PIXELS)
    stripe, block = tl.program_id(0) % STRIPES, tl.program_id(0) // STRIPES % blocks
    n = (tl.program_id(0) // STRIPES // blocks).to(tl.int64)  # axis 0: axes 1 and 2 stop at 65,535

    pixel = block * PIXELS + tl.arange(0, PIXELS)
    row, column = pixel // (2 * width), pixel % (2 * width)  # a division per pixel, none per element
    source = (row + 1) // 2 * (width + 1) + (column + 1) // 2
    phase = row % 2 * 2 + column % 2
    c = stripe * CHANNELS + tl.arange(0, CHANNELS)
    mask = (pixel < pixels)[:, None] & (c < channels)[None, :]

    y_ptr += n * (height + 1) * (width + 1) * 4 * channels
    y = tl.load(y_ptr + (4 * source + phase)[:, None] * channels + c[None, :], mask=mask)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < channels)
        y = (y.to(tl.float32) + bias[None, :]).to(y.dtype)
    tl.store(out_ptr + n * pixels * channels + pixel[:, None] * channels + c[None, :], y, mask=mask)


def launch_interleave(out, y, bias):
    """Launch only; fastddpm.ops has checked every argument."""
    channels, height, width = out.shape[1], y.shape[2] - 1, y.shape[3] - 1
    each = min(MAX_CHANNELS, triton.next_power_of_2(channels))
    tile = {"CHANNELS": each, "PIXELS": BLOCK // each, "STRIPES": triton.cdiv(channels, each)}
    grid = (len(y) * triton.cdiv(4 * height * width, tile["PIXELS"]) * tile["STRIPES"],)
    with torch.cuda.device_of(y):
        launch(interleave_kernel, grid, out, y, bias, height, width, channels, **tile, **OPTIONS)
