"""The checks of the tests themselves fail for damaged results."""

import math

import pytest
import torch

from tests.support import check

REF = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double() + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correctly_rounded_results_pass(dtype):
    rounded = REF.to(dtype)
    check.assert_as_accurate(rounded, rounded, REF)
    check.assert_as_accurate(rounded, rounded, rounded.double())  # errors of 0
    ulp = torch.finfo(dtype).eps
    check.assert_as_accurate((REF * (1 + ulp / 2)).to(dtype), rounded, REF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "damage",
    [
        lambda x, ulp: x * (1 + 4 * ulp),
        lambda x, ulp: x + 4 * ulp,
        lambda x, ulp: torch.where(torch.arange(x.numel()).view(x.shape) == 5, x + 8 * ulp * 4, x),
        lambda x, ulp: torch.where(torch.arange(x.numel()).view(x.shape) == 5, math.nan, x),
        lambda x, ulp: torch.where(torch.arange(x.numel()).view(x.shape) == 5, math.inf, x),
        lambda x, ulp: x.mT,
        lambda x, ulp: x.flip(0),
        lambda x, ulp: x[:1],
        lambda x, ulp: x.unsqueeze(0),
        lambda x, ulp: torch.zeros_like(x),
    ],
    ids=["scaled", "shifted", "one element", "NaN", "inf", "transposed", "flipped", "shorter", "another rank", "zeros"],
)
def test_damaged_results_fail(dtype, damage):
    damaged = damage(REF, torch.finfo(dtype).eps).to(dtype)
    with pytest.raises(AssertionError):
        check.assert_as_accurate(damaged, REF.to(dtype), REF)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_results_of_plain_torch_fail(value):
    plain = REF.float()
    plain[0, 0, 0, 0] = value
    with pytest.raises(AssertionError):
        check.assert_as_accurate(REF.float(), plain, REF)


def fail(error: Exception | None) -> None:
    if error is not None:
        raise error


def test_error_line_accepts_only_a_value_error_of_one_line():
    assert check.error_line(fail, ValueError("x is 3; want 4")) == "x is 3; want 4"
    for text in ("", "x is 3\nwant 4"):
        with pytest.raises(AssertionError):
            check.error_line(fail, ValueError(text))
    with pytest.raises(TypeError):
        check.error_line(fail, TypeError("x is 3"))
    with pytest.raises(pytest.fail.Exception):
        check.error_line(fail, None)
