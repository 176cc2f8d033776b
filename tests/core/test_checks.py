"""Checks of arguments: which values pass, and what the error says about the others."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastddpm.core import checks
from tests.support.check import error_line

HUGE = 10**5000  # beyond floats, and beyond the digits that Python converts to text
NOT_NUMBERS = [None, True, False, np.True_, "1", "", b"1", [1], (1,), {}, 1j, Decimal(1), np.array([1]), torch.ones(1)]


@pytest.mark.parametrize("value", [0, 1, -1, HUGE, np.int64(3), np.uint8(3)], ids=checks.shown)
def test_whole_numbers(value):
    assert checks.is_whole(value)
    assert checks.whole("n", value, -1) == value
    assert type(checks.whole("n", value, -1)) is int


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 1.0, np.float32(1), math.nan, math.inf], ids=repr)
def test_what_is_no_whole_number(value):
    assert not checks.is_whole(value)
    assert error_line(checks.whole, "n", value, 0) == f"n is {value!r}; want a whole number, at least 0"


@pytest.mark.parametrize(
    ("value", "fits"),
    [(2, False), (3, True), (5, True), (6, False), (HUGE, False), (-HUGE, False)],
    ids=checks.shown,
)
def test_range_of_whole_numbers(value, fits):
    if fits:
        assert checks.whole("n", value, 3, 5) == value
    else:
        line = error_line(checks.whole, "n", value, 3, 5)
        assert line.startswith("n is ")
        assert line.endswith("; want a whole number from 3 to 5")


@pytest.mark.parametrize(
    "value", [0, 1, 1.5, -2.5, Fraction(1, 2), np.float32(0.5), np.float64(0.5), np.int64(3), 2**300]
)
def test_real_numbers(value):
    assert checks.is_real(value)
    assert checks.real("x", value) == value
    assert type(checks.real("x", value)) is float


@pytest.mark.parametrize(
    "value", [*NOT_NUMBERS, math.nan, math.inf, -math.inf, np.float32("nan"), 10**400], ids=checks.shown
)
def test_what_is_no_finite_number(value):
    assert not checks.is_real(value)
    assert error_line(checks.real, "x", value) == f"x is {checks.shown(value)}; want a finite number"


@pytest.mark.parametrize("value", [HUGE, -HUGE, Fraction(HUGE, 3)], ids=["int", "negative int", "fraction"])
def test_numbers_beyond_floats_are_not_finite(value):
    assert not checks.is_real(value)
    assert error_line(checks.real, "x", value).endswith("; want a finite number")


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "want"),
    [
        ({"low": 0}, [0, 1e300], [-1e-300], ", at least 0"),
        ({"low": 0, "above": True}, [1e-300], [0, -1], ", above 0"),
        ({"low": 0, "high": 1}, [0, 1], [1.001, -0.001], ", at least 0, at most 1"),
        ({"high": 2}, [-1e300, 2], [2.1], ", at most 2"),
    ],
)
def test_range_of_real_numbers(limits, inside, outside, want):
    for value in inside:
        assert checks.real("x", value, **limits) == value
    for value in outside:
        assert error_line(checks.real, "x", value, **limits) == f"x is {value}; want a finite number{want}"


def test_flag_takes_booleans_alone():
    assert checks.flag("x", True) is True
    assert checks.flag("x", False) is False
    for value in ("false", "True", 0, 1, None, [], [True]):
        assert error_line(checks.flag, "x", value) == f"x is {value!r}; want True or False"


@pytest.mark.parametrize("value", [0, 1, 2**64 - 1, np.uint64(2**64 - 1), np.int32(5)])
def test_seeds(value):
    assert checks.seed(value) == value
    assert type(checks.seed(value)) is int


@pytest.mark.parametrize("value", [-1, 2**64, HUGE, 1.0, *NOT_NUMBERS], ids=checks.shown)
def test_what_is_no_seed(value):
    assert error_line(checks.seed, value) == f"seed is {checks.shown(value)}; want a whole number, 0 <= seed < 2^64"


@pytest.mark.parametrize("value", ["c", "", "A", None, 1, ["a"], {"a": 1}, np.array(["a"])], ids=repr)
def test_what_is_not_among_the_known(value):
    assert checks.one_of("x", "a", ("a", "b")) == "a"
    assert error_line(checks.one_of, "x", value, ("a", "b")) == f"x is {checks.shown(value)}; want one of a, b"


# What an error shows of a value


def test_short_values_are_shown_whole():
    for value in (1, 1.5, "a", None, [1, 2], "x" * 98):
        assert checks.shown(value) == repr(value)


def test_long_values_are_shortened_in_the_middle():
    assert checks.shown("x" * 10**6) == f"'{'x' * 49}...{'x' * 49}'"
    assert checks.shown(list(range(1000)), 10) == "[0, 1... 999]"


def test_values_are_shown_in_one_printable_line():
    for value in ("a\nb", "\x1b[2J", "\ud800", np.zeros((3, 3)), torch.zeros(3, 3)):
        assert checks.shown(value).isprintable()


def test_values_without_text_are_shown_by_their_kind():
    assert checks.shown(HUGE) == f"an int of {HUGE.bit_length()} bits"
    assert checks.shown(Fraction(HUGE, 3)) == "a Fraction"
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert checks.shown(nested) == "a list"
    while nested:  # to free it without recursion
        nested = nested.pop()


# Calls


@checks.checked_call
def example(samples, *, seed=0, steps=None):
    """Its docstring."""
    return samples, seed, steps


def test_checked_call_passes_what_fits():
    assert example(1, steps=2) == (1, 0, 2)
    assert example.__doc__ == "Its docstring."


@pytest.mark.parametrize(
    ("args", "keywords", "want"),
    [
        ((), {}, "example: missing a required argument: 'samples'; want samples, seed, steps"),
        ((1, 2), {}, "example: too many positional arguments; want samples, seed, steps"),
        ((1,), {"sed": 2}, "example: there is no argument 'sed'; did you mean 'seed'?; want samples, seed, steps"),
        ((1,), {"zzz": 2}, "example: there is no argument 'zzz'; want samples, seed, steps"),
    ],
)
def test_checked_call_names_the_way_out(args, keywords, want):
    assert error_line(example, *args, **keywords) == want
    with pytest.raises(TypeError):  # which it is, too
        example(*args, **keywords)
