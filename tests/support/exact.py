"""Formulas in 50 decimal digits, and float64 results compared with them."""

from decimal import Context, Decimal, localcontext
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor


def assert_close(got: Tensor, want: Tensor) -> None:
    """Assert that every difference is at most 1e-12 of the largest value."""
    assert got.dtype == want.dtype == torch.float64
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()


def decimals():
    """A context of 50 decimal digits."""
    return localcontext(Context(prec=50))


def float64(values: list) -> Tensor:
    """A matrix of decimal numbers, rounded."""
    return torch.tensor([[float(value) for value in row] for row in values], dtype=torch.float64)


def exact_abar(betas: Tensor) -> list[Decimal]:
    """abar of float64 betas, which are taken as exact."""
    with decimals():
        return list(accumulate((1 - Decimal(beta) for beta in betas.tolist()), mul))
