"""Forward noising x_0 -> x_t, and the parts of it that the losses repeat."""

import torch
from torch import Tensor

from fastddpm.core import layout, noise
from fastddpm.ops.backend import launcher
from fastddpm.ops.checks import check_noising, check_rows, dtype_names
from fastddpm.ops.library import FLOATS, register
from fastddpm.reference.diffusion import add_noise


def noising(
    x_0: Tensor,
    t: Tensor,
    address: Tensor,
    table: Tensor,
    *,
    stream: int = noise.TRAIN,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Noise clean samples in one shot: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4).

    Bit for bit `reference.diffusion.add_noise` in fp32 with eps = `noise.normal(address, ..., stream=stream, t=...)`,
    rounded once to dtype. The timestep in the noise's address is 0 for stream TRAIN and t for LIKELIHOOD.

    Args:
        x_0: [N, C, *spatial] or [N, D], channels-last: fp16/bf16/fp32 in data units, or uint8, which becomes
            (u - 127.5) * (2 / 255) in fp32: 0..255 -> [-1, 1].
        t: [N] int64 on x_0's device, 0 <= t < T. Unchecked: reading it would sync.
        address: [N, 2] int64 on x_0's device; (seed, sample index); for TRAIN the index counts the training examples.
        table: [T, 2] fp32 on x_0's device: sqrt(abar_t), sqrt(1 - abar_t), from `Schedule.noising_table`.
        stream: noise.TRAIN or noise.LIKELIHOOD.
        dtype: of the result, fp32/bf16/fp16.
    Returns: x_t like x_0, in dtype.
    Raises: ValueError: a shape, dtype, layout, device or stream is not as above, or x_0 requires a gradient.
    """
    check_noising("noising", x_0, t, address, table, stream)
    if dtype not in FLOATS:
        raise ValueError(f"noising: dtype is {dtype}; want one of {dtype_names(FLOATS)}")
    return torch.ops.fastddpm.noising(x_0, t, address, table, stream, dtype)


def data_units(x_0: Tensor) -> Tensor:
    """x_0 in fp32; the bytes 0..255 become [-1, 1]."""
    return (x_0.float() - 127.5) * (2 / 255) if x_0.dtype == torch.uint8 else x_0.float()


def has_t(stream: int) -> bool:
    """Whether t is part of the address of a stream's noise; if not, it is 0 there."""
    return stream == noise.LIKELIHOOD


def eps_of(x_0: Tensor, t: Tensor, address: Tensor, stream: int) -> Tensor:
    """The noise that `noising` adds to x_0."""
    return noise.normal(address, x_0.shape[1:], stream=stream, t=t if has_t(stream) else 0)


def _noising(x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    x_t = _noising_fake(x_0, t, address, table, stream, dtype)
    check_rows("noising", "t", t, len(table))
    if (launch := launcher("noising", x_0.device)) is not None:
        launch(x_t, x_0, t, address, table, stream=stream, with_t=has_t(stream))
        return x_t
    return x_t.copy_(add_noise(data_units(x_0), eps_of(x_0, t, address, stream), table[t]))


def _noising_fake(x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    return layout.empty(len(x_0), x_0.shape[1:], dtype=dtype, device=x_0.device)


register(
    "noising(Tensor x_0, Tensor t, Tensor address, Tensor table, int stream, ScalarType dtype) -> Tensor",
    _noising,
    _noising_fake,
)
