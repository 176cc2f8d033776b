"""Fused group norm of two inputs, and all that follows it: an activation, FiLM and a residual. In formulas,
act((normalised(cat([x, skip]) + add) * weight + bias) * (1 + scale) + shift) * film_scale + film_shift + residual.

Traffic: each input element is read once and y is written, 4 bytes per element in bf16, if a program holds its groups in
registers. Programs share groups that are too large for that, in two launches that read the input twice: 6 bytes. The
residual is read once.
Precision: fp32, rounded once. The variance is computed about the mean, in a second pass that also corrects the mean;
for shared groups by Welford's recurrence. Multiply-adds are fused, the activation's exponential is approximate, and in
16 bits its division is too: nothing here is specified to the bit.
Spec: cat, group_norm, * (1 + scale) + shift, silu and mish of torch. Proof: tests/ops/test_group_norm.py (float64),
tests/kernels/test_compiled.py.
"""

from math import gcd, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import launch

FULL = 264  # programs that fill a GPU: two for each of the 132 multiprocessors of an H200
HELD = 16_384  # elements that a program holds: 32 in each thread of 16 warps
TILE = 4_096  # elements that a program reads at once if programs share groups: 16 in each thread of 8 warps
OPTIONS = {"enable_fp_fusion": True}  # Triton 3.9 warns unless this is said, and 3.10 changes the default
MAX_SLABS = 128  # programs that share a group: each of them reads the statistics of all


class Plan(NamedTuple):
    """How the work is divided: a program takes `groups` adjacent groups and `slab` pixels of a sample, `rows` at once.

    If rows covers all pixels, one launch holds them in registers; otherwise one launch computes statistics, another y.
    """

    groups: int  # a power of two
    rows: int  # a power of two
    slab: int  # a multiple of rows
    warps: int


def plan(n: int, pixels: int, channels: int, groups: int, itemsize: int) -> Plan:
    """The plan for n samples of [pixels, channels] in elements of itemsize bytes. It depends on these numbers alone.

    Few programs are limited by latency, so each takes one group and has many threads. Enough programs to fill a GPU
    are limited by memory traffic, so each takes up to 64 bytes of a pixel: two sectors, which no other program reads.
    """
    width = triton.next_power_of_2(channels // groups)
    rows = triton.next_power_of_2(pixels)
    takes = _takes(channels, groups, itemsize, 64)
    if rows * width <= HELD:
        full = [t for t in takes if n * triton.cdiv(groups, t) >= FULL and rows * width * t <= HELD // 2]
        take = max(full, default=1)
        return Plan(take, rows, rows, _warps(rows * width * take, 32 if full else 16))
    take = max(takes)
    rows = max(1, TILE // (width * take))
    return Plan(take, rows, _slab(pixels, rows, 2 * FULL // (n * triton.cdiv(groups, take))), 8)


def candidates(n: int, pixels: int, channels: int, groups: int, itemsize: int) -> list[Plan]:
    """The plans worth comparing by measurement; `plan` returns one of them."""
    plans = {plan(n, pixels, channels, groups, itemsize)}
    width = triton.next_power_of_2(channels // groups)
    for take in _takes(channels, groups, itemsize, 128):
        rows = triton.next_power_of_2(pixels)
        if rows * width * take <= 2 * HELD:
            plans |= {Plan(take, rows, rows, _warps(rows * width * take, per_thread)) for per_thread in (8, 16, 32)}
        rows = max(1, TILE // (width * take))
        if rows < pixels:
            for programs in (FULL, 2 * FULL, 4 * FULL):
                slab = _slab(pixels, rows, programs // (n * triton.cdiv(groups, take)))
                plans |= {Plan(take, rows, slab, warps) for warps in (4, 8)}
    return sorted(plans)


def _takes(channels: int, groups: int, itemsize: int, most: int) -> list[int]:
    """How many groups a program may take: one, or as many as fill 16-byte accesses, up to `most` bytes of a pixel."""
    group_bytes = channels // groups * itemsize
    aligned = 16 // gcd(16, group_bytes)
    doubled = (aligned << k for k in range(8))
    return sorted({1} | {take for take in doubled if take <= groups and take * group_bytes <= most})


def _warps(elements: int, per_thread: int) -> int:
    return min(16, max(1, elements // (32 * per_thread)))


def _slab(pixels: int, rows: int, slabs: int) -> int:
    slabs = min(MAX_SLABS, max(1, slabs))
    return triton.cdiv(triton.cdiv(pixels, slabs), rows) * rows


@triton.jit
def held_kernel(
    y_ptr,  # [N, pixels, channels] like x: [x's channels, skip's channels]
    x_ptr,  # [N, pixels, x_channels] fp32, bf16 or fp16
    skip_ptr,  # [N, pixels, channels - x_channels] like x, or None
    add_ptr,  # [N, channels] fp32, rows add_stride apart (0: one row for all), or None
    weight_ptr,  # [channels] fp32
    bias_ptr,  # [channels] fp32
    scale_shift_ptr,  # [N, 2, channels] fp32: scales, then shifts; rows scale_shift_stride apart; or None
    film_scale_ptr,  # [N, channels] fp32, rows film_stride apart, or None
    film_shift_ptr,  # like film_scale, or None
    residual_ptr,  # like y, or None
    pixels,
    channels,
    x_channels,
    add_stride,
    scale_shift_stride,
    film_stride,
    eps,
    ACT: tl.constexpr,  # "silu", "mish" or None
    PER_GROUP: tl.constexpr,  # channels of a group
    WIDTH: tl.constexpr,  # PER_GROUP, padded to a power of two
    GROUPS: tl.constexpr,  # of a program
    STRIPES: tl.constexpr,  # programs that cover all groups of a pixel
    ROWS: tl.constexpr,  # at least pixels
):
    """Compute y by programs that hold their groups."""
    stripe, n = tl.program_id(0) % STRIPES, (tl.program_id(0) // STRIPES).to(tl.int64)
    row = tl.arange(0, ROWS)
    flat, exists = _channels_of(tl.arange(0, GROUPS * WIDTH), stripe, channels, PER_GROUP, WIDTH, GROUPS)
    column = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    c, inside = _channels_of(column, stripe, channels, PER_GROUP, WIDTH, GROUPS)
    mask = (row < pixels)[:, None] & exists[None, :]
    x = _load_tile(x_ptr, skip_ptr, n, row, flat, mask, pixels, channels, x_channels).reshape(ROWS, GROUPS, WIDTH)
    add = _centred(add_ptr, n * add_stride + c, inside, PER_GROUP)
    at = n * scale_shift_stride + c
    weight, bias = _affine(weight_ptr, bias_ptr, scale_shift_ptr, c, at, inside, channels)
    count = _values_per_place(row < pixels, PER_GROUP, WIDTH)
    centred, _, delta, var = _group_moments(x, add, count, None, pixels * PER_GROUP)
    scale = weight * tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    y = _activated(centred * scale + (bias - delta * scale), y_ptr.dtype.element_ty, ACT)
    y = _scaled_and_shifted(y, film_scale_ptr, film_shift_ptr, n * film_stride + c, inside)
    _store_tile(y_ptr, residual_ptr, y, n, row, flat, mask, pixels, channels)


@triton.jit
def statistics_kernel(
    statistics_ptr,  # [N, slabs, 3, groups] fp32: mean, its correction, variance
    x_ptr,  # the rest as in held_kernel
    skip_ptr,
    add_ptr,
    pixels,
    channels,
    x_channels,
    add_stride,
    slabs,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIPES: tl.constexpr,
    ROWS: tl.constexpr,  # pixels at a time
    SLAB: tl.constexpr,  # pixels of a program
):
    """Compute the statistics of each group over each slab."""
    stripe, n = tl.program_id(0) % STRIPES, (tl.program_id(0) // STRIPES // slabs).to(tl.int64)
    s = tl.program_id(0) // STRIPES % slabs
    row = tl.arange(0, ROWS)
    flat, exists = _channels_of(tl.arange(0, GROUPS * WIDTH), stripe, channels, PER_GROUP, WIDTH, GROUPS)
    column = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    c, inside = _channels_of(column, stripe, channels, PER_GROUP, WIDTH, GROUPS)
    add = _centred(add_ptr, n * add_stride + c, inside, PER_GROUP)

    rows = tl.minimum(pixels - s * SLAB, SLAB)
    mean = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    inner = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    # each place of the tile accumulates its own values: threads exchange nothing in the loop
    for i in range(0, SLAB, ROWS):
        mask = (row < rows - i)[:, None] & exists[None, :]
        x = _load_tile(x_ptr, skip_ptr, n, s * SLAB + i + row, flat, mask, pixels, channels, x_channels)
        off = tl.where(mask, x - mean, 0)
        mean += off * (ROWS / (i + ROWS))
        inner += off * (x - mean)
    seen = (rows - row + (ROWS - 1)) // ROWS
    mean, inner = mean.reshape(ROWS, GROUPS, WIDTH), inner.reshape(ROWS, GROUPS, WIDTH)
    _, mean, delta, var = _group_moments(mean, add, _values_per_place(seen, PER_GROUP, WIDTH), inner, rows * PER_GROUP)

    g = stripe * GROUPS + tl.arange(0, GROUPS)
    groups = channels // PER_GROUP
    at = statistics_ptr + (n * slabs + s) * (3 * groups) + g
    tl.store(at, mean.reshape(GROUPS), mask=g < groups)
    tl.store(at + groups, delta.reshape(GROUPS), mask=g < groups)
    tl.store(at + 2 * groups, var.reshape(GROUPS), mask=g < groups)


@triton.jit
def apply_kernel(
    y_ptr,  # all as in the kernels above
    x_ptr,
    skip_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    scale_shift_ptr,
    film_scale_ptr,
    film_shift_ptr,
    residual_ptr,
    statistics_ptr,
    pixels,
    channels,
    x_channels,
    add_stride,
    scale_shift_stride,
    film_stride,
    slabs,
    eps,
    ACT: tl.constexpr,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIPES: tl.constexpr,
    ROWS: tl.constexpr,
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,  # at least slabs
):
    """Compute y from the statistics of all slabs."""
    stripe, n = tl.program_id(0) % STRIPES, (tl.program_id(0) // STRIPES // slabs).to(tl.int64)
    s = tl.program_id(0) // STRIPES % slabs
    row = tl.arange(0, ROWS)
    flat, exists = _channels_of(tl.arange(0, GROUPS * WIDTH), stripe, channels, PER_GROUP, WIDTH, GROUPS)
    column = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    c, inside = _channels_of(column, stripe, channels, PER_GROUP, WIDTH, GROUPS)
    add = _centred(add_ptr, n * add_stride + c, inside, PER_GROUP)
    at = n * scale_shift_stride + c
    weight, bias = _affine(weight_ptr, bias_ptr, scale_shift_ptr, c, at, inside, channels)

    each, g = tl.arange(0, SLABS)[:, None], stripe * GROUPS + tl.arange(0, GROUPS)[None, :]
    groups = channels // PER_GROUP
    at = statistics_ptr + (n * slabs + each) * (3 * groups) + g
    share = tl.minimum(tl.maximum(pixels - each * SLAB, 0), SLAB) / pixels
    mean, delta, var = _moments_of_slabs(at, groups, share, (each < slabs) & (g < groups))
    mean = tl.where(inside, mean[:, None], 0)[None]
    scale = weight * tl.div_rn(1.0, tl.sqrt_rn(var + eps))[None, :, None]
    offset = bias - delta[None, :, None] * scale
    if add is not None:
        offset += add * scale

    rows = tl.minimum(pixels - s * SLAB, SLAB)
    for i in range(0, SLAB, ROWS):
        pixel, mask = s * SLAB + i + row, (row < rows - i)[:, None] & exists[None, :]
        x = _load_tile(x_ptr, skip_ptr, n, pixel, flat, mask, pixels, channels, x_channels).reshape(ROWS, GROUPS, WIDTH)
        y = _activated((x - mean) * scale + offset, y_ptr.dtype.element_ty, ACT)
        y = _scaled_and_shifted(y, film_scale_ptr, film_shift_ptr, n * film_stride + c, inside)
        _store_tile(y_ptr, residual_ptr, y, n, pixel, flat, mask, pixels, channels)


@triton.jit
def _channels_of(column, stripe, channels, PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """The channel at each column of a stripe, and whether it exists."""
    first = stripe * (GROUPS * PER_GROUP)
    if PER_GROUP == WIDTH:  # so the compiler sees that neighbouring columns are neighbouring channels
        channel = first + column
        exists = channel < channels
    else:
        channel = first + column // WIDTH * PER_GROUP + column % WIDTH
        exists = (column % WIDTH < PER_GROUP) & (channel < channels)
    return channel, exists


@triton.jit
def _load_tile(x_ptr, skip_ptr, n, pixel, channel, mask, pixels, channels, x_channels):
    """[pixels, channels] of sample n, in fp32; 0 where the mask is false."""
    at = x_ptr + n * pixels * x_channels + (pixel[:, None] * x_channels + channel[None, :])
    if skip_ptr is not None:
        skip_channels = channels - x_channels
        other = pixel[:, None] * skip_channels + (channel[None, :] - x_channels)
        at = tl.where(channel[None, :] < x_channels, at, skip_ptr + n * pixels * skip_channels + other)
    return tl.load(at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _activated(y, dtype: tl.constexpr, ACT: tl.constexpr):
    """ACT of y. Args: dtype: that of the result in memory; its division is exact only in fp32."""
    if ACT == "silu":
        below = 1 + tl.exp2(y * -1.4426950408889634)  # inf from y = -128 down: y / inf = -0
        y = tl.div_rn(y, below) if dtype == tl.float32 else y / below
    if ACT == "mish":  # with w = exp(y), tanh(log(1 + w)) is above / (above + 2); from y = 20 on, 1
        w = tl.exp2(tl.minimum(y, 20) * 1.4426950408889634)
        above = w * (w + 2)
        y *= tl.div_rn(above, above + 2) if dtype == tl.float32 else above / (above + 2)
    return y


@triton.jit
def _scaled_and_shifted(y, scale_ptr, shift_ptr, at, mask):
    """y [rows, groups, width] times a scale, plus a shift, for each channel; each pointer may be None."""
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + at, mask=mask)[None]
    if shift_ptr is not None:
        y += tl.load(shift_ptr + at, mask=mask)[None]
    return y


@triton.jit
def _store_tile(y_ptr, residual_ptr, y, n, pixel, channel, mask, pixels, channels):
    """Store y [rows, groups, width] plus the residual, if there is one."""
    at = n * pixels * channels + (pixel[:, None] * channels + channel[None, :])
    y = y.reshape(mask.shape[0], mask.shape[1])
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _centred(add_ptr, at, mask, PER_GROUP: tl.constexpr):
    """[1, groups, width] of add minus its mean over each group, which cannot change the norm's result; or None."""
    if add_ptr is not None:
        add = tl.load(add_ptr + at, mask=mask, other=0)
        return (add - tl.sum(add, 1)[:, None] / PER_GROUP)[None]


@triton.jit
def _affine(weight_ptr, bias_ptr, scale_shift_ptr, c, at, mask, channels):
    """Weight and bias of the channels c, [1, groups, width] each, changed by the scales and shifts at `at`."""
    weight, bias = tl.load(weight_ptr + c, mask=mask), tl.load(bias_ptr + c, mask=mask)
    if scale_shift_ptr is not None:
        scale = 1 + tl.load(scale_shift_ptr + at, mask=mask)
        weight, bias = weight * scale, bias * scale + tl.load(scale_shift_ptr + at + channels, mask=mask)
    return weight[None], bias[None]


@triton.jit
def _values_per_place(seen, PER_GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """How many values each place of a tile has accumulated, from the number of each row: [rows, 1, 1 or WIDTH] fp32."""
    count = seen.to(tl.float32)[:, None, None]
    if PER_GROUP < WIDTH:
        count *= (tl.arange(0, WIDTH) < PER_GROUP).to(tl.float32)[None, None, :]
    return count


@triton.jit
def _group_moments(x, shift, count, inner, size):
    """Statistics of each group over x + shift, where each x is the mean of `count` values.

    Args: x: [rows, groups, width]; shift: like x, or None for 0; inner: like x, the sum of squares of the count values
        about x, or None for 0; size: how many values a group has.
    Returns: x - mean + shift; then, [1, groups, 1] each: the rounded mean of x, its correction, and the variance.
    """
    mean = (_total(count * x) / size)[None, :, None]
    centred = x - mean
    if shift is not None:
        centred += shift
    first = count * centred
    second = first * centred
    if inner is not None:
        second += inner
    delta, square = tl.split(_total(tl.join(first, second)) / size)
    delta = delta[None, :, None]
    return centred, mean, delta, square[None, :, None] - delta * delta


@triton.jit
def _moments_of_slabs(at, groups, share, mask):
    """The statistics of each group, from those of its slabs at `at`; [groups] each, as by `_group_moments`.

    Args: at, mask: [slabs, groups]; share: [slabs, 1], the part of the pixels that each has.
    """
    means = tl.load(at, mask=mask, other=0)
    deltas = tl.load(at + groups, mask=mask, other=0)
    variances = tl.load(at + 2 * groups, mask=mask, other=0)
    mean = tl.sum(share * means, 0)
    off = means - mean[None, :] + deltas
    delta = tl.sum(share * off, 0)
    return mean, delta, tl.sum(share * (variances + off * off), 0) - delta * delta


@triton.jit
def _total(x):
    """[rows, groups, width, ...] -> [groups, ...]."""
    return tl.sum(tl.sum(x, 2), 0)


def launch_group_norm(y, x, weight, bias, groups, eps, skip, add, scale_shift, film, residual, *, act):
    """Launches only: fastddpm.ops has checked every argument."""
    n, channels, *spatial = y.shape
    pixels, per_group = prod(spatial), channels // groups
    division = plan(n, pixels, channels, groups, y.element_size())
    stripes, slabs = triton.cdiv(groups, division.groups), triton.cdiv(pixels, division.slab)
    film_scale = None if film is None or film.shape[1] == channels else film[:, :channels]
    film_shift = None if film is None else film[:, -channels:]
    inputs, others = (x, skip, add), (weight, bias, scale_shift, film_scale, film_shift, residual)
    sizes, strides = (pixels, channels, x.shape[1], _stride_of_rows(add)), map(_stride_of_rows, (scale_shift, film))
    tile = {"PER_GROUP": per_group, "WIDTH": triton.next_power_of_2(per_group), "GROUPS": division.groups}
    tile |= {"STRIPES": stripes, "ROWS": division.rows, "num_warps": division.warps, **OPTIONS}
    with torch.cuda.device_of(x):
        if division.rows >= pixels:
            return launch(held_kernel, (n * stripes,), y, *inputs, *others, *sizes, *strides, eps, ACT=act, **tile)
        statistics = torch.empty(n, slabs, 3, groups, dtype=torch.float32, device=x.device)
        grid = (n * stripes * slabs,)
        tile["SLAB"] = division.slab
        launch(statistics_kernel, grid, statistics, *inputs, *sizes, slabs, **tile)
        tile |= {"SLABS": triton.next_power_of_2(slabs), "ACT": act}
        launch(apply_kernel, grid, y, *inputs, *others, statistics, *sizes, *strides, slabs, eps, **tile)


def _stride_of_rows(rows):
    """From the row of an entry to the next; 0: there are no rows, or one for all entries."""
    return 0 if rows is None or len(rows) == 1 else rows.stride(0)
