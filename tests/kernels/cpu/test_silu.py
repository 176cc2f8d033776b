"""SiLU of the C++ kernels: its error over all of float32, and the same bits on every instruction set."""

import math

import pytest
import torch
from torch import Tensor

from fastddpm.kernels.cpu.launch import launch_silu
from tests.kernels.cpu.conftest import INSTRUCTION_SETS
from tests.support.bits import same_bits

CHUNK = 1 << 23  # the numbers of one exponent


def silu(x: Tensor) -> Tensor:
    y = torch.full_like(x, math.nan)
    launch_silu(y, x)
    return y


def exact(x: Tensor) -> Tensor:
    x = x.double()
    y = x * torch.sigmoid(x)
    return torch.where(x < -300, -0.0, y)  # also for -infinity


def error_in_ulp(got: Tensor, want: Tensor) -> Tensor:
    """Errors in units in the last place of the exact results, which are float64."""
    rounded = want.float().abs()
    ulp = (rounded.nextafter(torch.tensor(math.inf)).double() - rounded.double()).clamp(min=2.0**-149)
    return torch.where(got == want, 0.0, (got.double() - want).abs() / ulp)


def all_float32(first: int = 0, stride: int = 1):
    """All float32 numbers in chunks of one exponent, from chunk `first` on, every stride-th chunk."""
    for low in range(-(1 << 31) + first * CHUNK, 1 << 31, CHUNK * stride):
        yield torch.arange(low, low + CHUNK, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.mark.slow
def test_silu_errs_by_at_most_3_5_ulp():
    """Computes all float32 numbers; float64 is needed for the tenth of them for which the result is not obvious."""
    worst = 0.0
    for x in all_float32():
        y, least, most = silu(x), x[0], x[-1]
        if x.isnan().any():  # the chunk of an infinity, or one of NaN alone
            assert torch.equal(y.isnan(), x.isnan())
            assert torch.equal(y[~x.isnan()], exact(x[~x.isnan()]).float())
        elif least >= 30:  # exp(-30) is less than half a unit of 1
            assert torch.equal(y, x)
        elif least <= -120:
            assert (y == 0).all()
            assert y.signbit().all()
        elif most.abs() < 2**-26:  # x / 2 + x^2 / 4 is x / 2
            assert torch.equal(y, x / 2)
        else:
            worst = max(worst, error_in_ulp(y, exact(x)).max().item())
    assert 3 < worst <= 3.5  # the statement in silu.h is true, and not too cautious


def test_a_wrong_silu_is_detected():
    x = torch.linspace(-20, 20, 10_001)
    y = silu(x)
    assert error_in_ulp(y, exact(x)).max() <= 3.5
    assert error_in_ulp(y * (1 + 2**-21), exact(x)).max() > 3.5


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_silu_has_the_same_bits_on_every_instruction_set(isa, use):
    for x in all_float32(37, 64):
        want = silu(x)
        with use(isa):
            got = silu(x)
        nan = x.isnan()
        assert same_bits(got[~nan], want[~nan])
        assert got[nan].isnan().all()


def test_silu_at_the_ends():
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 88.0, -90.0, -103.0, -120.0, 3e38, -3e38, 1e-45])
    y = silu(x)
    want = exact(x).float()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.signbit()[~x.isnan()], want.signbit()[~x.isnan()])
    assert y[3] == 0
    assert y[6] == pytest.approx(-90 * math.exp(-90), rel=1e-6, abs=0)  # F.silu returns 0 here
