"""Inputs of the two squared errors, `ops.eps_loss` and `ops.x_0_error`."""

import torch
from torch import Tensor

from fastddpm.core import layout
from fastddpm.core.schedule import Schedule
from tests.support.draws import POSITIONS, addresses, generator

__all__ = ["NOISING_TABLE", "SHAPES", "inputs", "normal_tensor"]

NOISING_TABLE = Schedule().noising_table()
# a block is 1024 elements; these need one, two and three levels of blocks
SHAPES = [(1, 1, 1, 1), (2, 3, 32, 32), (3, 5, 7, 11), (4, 3, 50), (1, 1024), (1, 1023), (1, 1025), (2, 4, 257)]


def normal_tensor(shape, seed) -> Tensor:
    return layout.channels_last(torch.randn(shape, generator=generator(seed)))


def inputs(shape, m_dtype=torch.float32, x_dtype=torch.uint8, table=NOISING_TABLE):
    """m, x_0, t, address and table, on the CPU."""
    m, x_0 = normal_tensor(shape, 1).to(m_dtype), normal_tensor(shape, 2)
    if x_dtype == torch.uint8:
        x_0 = (x_0 * 40 + 128).clamp(0, 255)
    return m, x_0.to(x_dtype), torch.tensor(POSITIONS[: shape[0]]), addresses(shape[0]), table
