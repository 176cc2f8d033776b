"""SiLU and Mish of the C++ kernels: errors over all of float32, and the same bits on every instruction set."""

import math

import pytest
import torch
from torch import Tensor

from fastddpm.kernels.cpu.launch import launch_activation
from tests.kernels.cpu.conftest import INSTRUCTION_SETS
from tests.support.bits import same_bits

CHUNK = 1 << 23  # the numbers of one exponent


def activated(x: Tensor, act: str) -> Tensor:
    y = torch.full_like(x, math.nan)
    launch_activation(y, x, act=act)
    return y


def exact(x: Tensor, act: str) -> Tensor:
    x = x.double()
    y = x * (torch.sigmoid(x) if act == "silu" else torch.tanh(torch.log1p(torch.exp(x))))
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
@pytest.mark.parametrize(("act", "bound", "slope"), [("silu", 3.5, 0.5), ("mish", 4.5, 0.6)])
def test_activations_err_by_as_much_as_stated(act, bound, slope):
    """Computes all float32 numbers; float64 is needed for the tenth of them for which the result is not obvious."""
    worst = 0.0
    for x in all_float32():
        y, least, most = activated(x, act), x[0], x[-1]
        if x.isnan().any():  # the chunk of an infinity, or one of NaN alone
            assert torch.equal(y.isnan(), x.isnan())
            assert torch.equal(y[~x.isnan()], exact(x[~x.isnan()], act).float())
        elif least >= 30:  # exp(-30) is less than half a unit of 1
            assert torch.equal(y, x)
        elif least <= -120:
            assert (y == 0).all()
            assert y.signbit().all()
        elif most.abs() < 2**-26:  # the result is the slope at 0 times x
            worst = max(worst, error_in_ulp(y, slope * x.double()).max().item())
        else:
            worst = max(worst, error_in_ulp(y, exact(x, act)).max().item())
    assert bound - 0.5 < worst <= bound  # the statement in activation.h is true, and not too cautious


@pytest.mark.parametrize(("act", "bound"), [("silu", 3.5), ("mish", 4.5)])
def test_a_wrong_activation_is_detected(act, bound):
    x = torch.linspace(-20, 20, 10_001)
    y = activated(x, act)
    assert error_in_ulp(y, exact(x, act)).max() <= bound
    assert error_in_ulp(y * (1 + 2**-20), exact(x, act)).max() > bound


@pytest.mark.parametrize("act", ["silu", "mish"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_activations_have_the_same_bits_on_every_instruction_set(isa, act, use):
    for x in all_float32(37, 64):
        want = activated(x, act)
        with use(isa):
            got = activated(x, act)
        nan = x.isnan()
        assert same_bits(got[~nan], want[~nan])
        assert got[nan].isnan().all()


@pytest.mark.parametrize("act", ["silu", "mish"])
def test_activations_at_the_ends(act):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 88.0, -90.0, -103.0, -120.0, 3e38, -3e38, 1e-45])
    y = activated(x, act)
    want = exact(x, act).float()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.signbit()[~x.isnan()], want.signbit()[~x.isnan()])
    assert y[3] == 0
    assert y[6] == pytest.approx(-90 * math.exp(-90), rel=1e-6, abs=0)  # torch returns 0 here


def test_act_none_is_the_identity():
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, -7.5])
    y = torch.full_like(x, math.nan)
    launch_activation(y, x, act=None)
    assert same_bits(y, x)
