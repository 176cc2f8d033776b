"""Comparisons bit for bit."""

import torch
from torch import Tensor

from fastddpm.core import layout

__all__ = ["assert_same_bits", "same_bits"]


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Whether both have the same dtype, shape and bits; want is on the CPU."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[want.element_size()]
    return got.dtype == want.dtype and torch.equal(got.detach().cpu().view(kind), want.view(kind))


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """got has the dtype, shape and bits of want, and is channels-last in memory."""
    assert got.dtype == want.dtype
    assert layout.is_channels_last(got)
    assert same_bits(got, want)
