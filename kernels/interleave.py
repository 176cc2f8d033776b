"""Interleaves the four phases of a polyphase upsampling into one image, and adds the bias: reads y, writes out.

Traffic: one read and one write per output element: 4 bytes in bf16.
Precision: the sum in fp32, rounded once; without a bias the bits are copied.
Spec: the same in torch, bit for bit. Proof: tests/ops/test_interleave.py (bits), tests/kernels/test_compiled.py.
"""

import torch
import triton
import triton.language as tl

from .launch import launch

BLOCK = 2048  # elements per program
MAX_CHANNELS = 64  # per program: 128 bytes in bf16, one cache line
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # 16 elements per thread: in bf16 16 bytes of each of 2 pixels


@triton.jit(do_not_specialize=["height", "width"])  # compiled once for all resolutions of a network
def interleave_kernel(
    out_ptr,  # [N, 2 height, 2 width, channels], y's dtype
    y_ptr,  # [N, height + 1, width + 1, 4 channels] fp32, bf16 or fp16
    bias_ptr,  # [channels] fp32, or None
    height,  # and width: before upsampling
    width,
    channels,
    CHANNELS: tl.constexpr,  # per program, a power of two
    PIXELS: tl.constexpr,  # per program, a power of two
    STRIPES: tl.constexpr,  # programs needed to cover all channels of a pixel
):
    pixels = 4 * height * width
    blocks = tl.cdiv(pixels, PIXELS)
    stripe, block = tl.program_id(0) % STRIPES, tl.program_id(0) // STRIPES % blocks
    n = (tl.program_id(0) // STRIPES // blocks).to(tl.int64)  # axis 0: axes 1 and 2 stop at 65,535

    pixel = block * PIXELS + tl.arange(0, PIXELS)
    row, column = pixel // (2 * width), pixel % (2 * width)  # divides once per pixel, not once per element
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
    """Launches only: fastddpm.ops has checked every argument."""
    channels, height, width = out.shape[1], y.shape[2] - 1, y.shape[3] - 1
    block_channels = min(MAX_CHANNELS, triton.next_power_of_2(channels))
    tile = {
        "CHANNELS": block_channels,
        "PIXELS": BLOCK // block_channels,
        "STRIPES": triton.cdiv(channels, block_channels),
    }
    grid = (len(y) * triton.cdiv(4 * height * width, tile["PIXELS"]) * tile["STRIPES"],)
    with torch.cuda.device_of(y):
        launch(interleave_kernel, grid, out, y, bias, height, width, channels, **tile, **OPTIONS)
