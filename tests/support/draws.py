"""Random inputs and noise addresses of the tests of kernels and operations."""

import pytest
import torch
from torch import Tensor

from fastddpm.core import layout, noise

__all__ = ["POSITIONS", "SAMPLES", "SEEDS", "addresses", "generator", "numpy_warns", "positions", "step_inputs"]

POSITIONS = [999, 0, 500, 1]  # both ends of a table: S = 0 at 0; 1/sqrt(abar) = 157 at 999
SEEDS = [2**64 - 1, 0, 2**63, 12345]
SAMPLES = [2**56 - 1, 2**32, 7, 2**32 - 1]

numpy_warns = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # in the interpreter


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def addresses(n: int) -> Tensor:
    """[n, 2] int64, n up to 4: seeds and sample indices that use all of their bits."""
    return torch.cat([noise.address(seed, [sample]) for seed, sample in zip(SEEDS[:n], SAMPLES[:n], strict=True)])


def positions(*pos: int) -> Tensor:
    return torch.tensor(pos, dtype=torch.int32)


def step_inputs(shape, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor]:
    """x, and m in dtype."""
    x, m = (torch.randn(shape, generator=generator(seed + i)) * 1.5 for i in range(2))
    return layout.channels_last(x), layout.channels_last(m.to(dtype))
