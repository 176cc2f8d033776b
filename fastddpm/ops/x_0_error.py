"""The squared error of the predicted x_0, for the variational bound."""

from typing import Any

import torch
from torch import Tensor

from fastddpm.core import layout, noise
from fastddpm.ops.backend import launcher
from fastddpm.ops.checks import check_model_output, check_no_gradients, check_noising, check_rows
from fastddpm.ops.library import register
from fastddpm.ops.noising import data_units, eps_of, has_t
from fastddpm.reference.diffusion import add_noise, predicted_x_0, squared_error


def x_0_error(
    m: Tensor, x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, *, stream: int = noise.LIKELIHOOD
) -> Tensor:
    """Squared error of the predicted x_0, of each sample: all that a term of the variational bound needs.

    |scale clamp(cx x_t + cm m, lo, hi) - x_0|^2 (Ho et al. 2020, eq. 15 in eq. 8), with x_t computed again from x_0 and
    the noise at its address. Bit for bit `reference.diffusion.squared_error` of `predicted_x_0` in fp32, a sum
    over the sample's elements.

    Args:
        m: [N, C, *spatial] or [N, D] fp16/bf16/fp32, channels-last: the network's output for x_t.
        x_0: of m's shape, as `noising` takes it.
        t, address, stream: the ones that `noising` got for x_t.
        table: [T, 7] fp32 on x_0's device: sqrt(abar_t), sqrt(1 - abar_t), cx, cm, lo, hi, scale; infinite lo and
            hi clip nothing.
    Returns: [N] fp32.
    Raises: ValueError: a shape, dtype, layout, device or stream is not as above, or m or x_0 requires a gradient.
    """
    hint = "Schedule.noising_table() beside the first four columns of Schedule.table().rows and its scale"
    check_noising("x_0_error", x_0, t, address, table, stream, columns=7, hint=hint)
    check_model_output("x_0_error", m, x_0)
    check_no_gradients("x_0_error", m=m)
    return torch.ops.fastddpm.x_0_error(layout.channels_last(m), x_0, t, address, table, stream)


def _x_0_error(m: Tensor, x_0: Tensor, t: Tensor, address: Tensor, table: Tensor, stream: int) -> Tensor:
    if not m.numel():
        return m.new_zeros(len(m), dtype=torch.float32)
    check_rows("x_0_error", "t", t, len(table))
    if (launch := launcher("x_0_error", m.device)) is not None:
        return launch(m, x_0, t, address, table, stream=stream, with_t=has_t(stream))
    x, (noising_row, prediction_row) = data_units(x_0), table[t].split([2, 5], 1)
    x_t = add_noise(x, eps_of(x_0, t, address, stream), noising_row)
    return squared_error(predicted_x_0(x_t, m, prediction_row), x)


def _x_0_error_fake(m: Tensor, *args: Any) -> Tensor:
    return m.new_empty(len(m), dtype=torch.float32)


register(
    "x_0_error(Tensor m, Tensor x_0, Tensor t, Tensor address, Tensor table, int stream) -> Tensor",
    _x_0_error,
    _x_0_error_fake,
)
