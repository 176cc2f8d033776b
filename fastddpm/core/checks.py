"""Checks of arguments that several rooms share. An error names the argument, its value and what was wanted."""

import math
import numbers
from collections.abc import Collection
from typing import Any, TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Whether value is a whole number of Python or numpy; a bool is not one."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Whether value is a finite number of Python or numpy; a bool is not one."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    """Return value as an int. Raises: ValueError: it is not a whole number from low to high."""
    if not is_whole(value) or not low <= value <= high:
        span = f", at least {low}" if high == math.inf else f" from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; want a whole number{span}")
    return int(value)


def seed(value: Any) -> int:
    """Return a seed as an int. Raises: ValueError: it is not a whole number, 0 <= seed < 2^64."""
    if not is_whole(value) or not 0 <= value < 1 << 64:
        raise ValueError(f"seed is {value!r}; want a whole number, 0 <= seed < 2^64")
    return int(value)


def one_of(name: str, value: Any, known: Collection[str]) -> str:
    """Return value. Raises: ValueError: it is not one of the known options."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; want one of {', '.join(known)}")
    return value
