"""Checks of arguments that several rooms share. An error names the argument, its value and what was wanted."""

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Collection
from typing import Any, TypeGuard, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


class ArgumentError(ValueError, TypeError):
    """A call does not fit the signature: ValueError like any wrong argument, TypeError as Python raises it."""


def checked_call(function: Function) -> Function:
    """Decorate a function so that an argument that it does not have, or one that is missing, names the way out."""
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name not in ("self", "cls")]

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        try:
            signature.bind(*args, **keywords)
        except TypeError as error:
            where = function.__qualname__.removesuffix(".__init__")
            problem = f"{where}: {error}"
            for unknown in [name for name in keywords if name not in names][:1]:
                alike = difflib.get_close_matches(unknown, names, 1)
                hint = f"; did you mean '{alike[0]}'?" if alike else ""
                problem = f"{where}: there is no argument '{unknown}'{hint}"
            raise ArgumentError(f"{problem}; want {', '.join(names)}") from None
        return function(*args, **keywords)

    return cast(Function, call)


def takes_options_of(other: Callable[..., Any]) -> Callable[[Function], Function]:
    """Decorate a function that passes its **options on to `other`: its signature then names them."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        keywords = [p for p in inspect.signature(other).parameters.values() if p.kind == p.KEYWORD_ONLY]
        more = [p for p in keywords if p.name not in signature.parameters]
        function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return function

    return decorate


def is_whole(value: object) -> TypeGuard[int]:
    """Whether value is a whole number of Python or numpy; a bool is not one."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Whether value is a finite number of Python or numpy; a bool is not one."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and _is_finite(value)


def shown(value: object, length: int = 100) -> str:
    """repr(value), shortened in the middle: a value from a file may be a string of a megabyte."""
    try:
        text = repr(value).replace("\n", " ")  # an error is one line
    except (ValueError, RecursionError):  # an int of more than 4300 digits; lists in lists in lists
        return f"an int of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def shape_of(value: Any) -> str:
    """The shape and dtype of an array or a tensor, such as "(2, 3) float32"; of anything else what `shown` returns."""
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return f"{tuple(value.shape)} {value.dtype}" if is_array else shown(value)


def whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    """Return value as an int. Raises: ValueError: it is not a whole number from low to high."""
    if not is_whole(value) or not low <= value <= high:
        span = f", at least {low}" if high == math.inf else f" from {low} to {high}"
        raise ValueError(f"{name} is {shown(value)}; want a whole number{span}")
    return int(value)


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> float:
    """Return value as a float.

    Args: above: the value must be greater than low, not equal to it.
    Raises: ValueError: it is not a finite number from low to high.
    """
    if not is_real(value) or not low <= value <= high or (above and value == low):
        limits = [f"{'above' if above else 'at least'} {low:g}"] * (low > -math.inf)
        limits += [f"at most {high:g}"] * (high < math.inf)
        raise ValueError(f"{name} is {shown(value)}; want a finite number{', ' * bool(limits)}{', '.join(limits)}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return value. Raises: ValueError: it is not a bool; the string "false" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; want True or False")
    return value


def seed(value: Any) -> int:
    """Return a seed as an int. Raises: ValueError: it is not a whole number, 0 <= seed < 2^64."""
    if not is_whole(value) or not 0 <= value < 1 << 64:
        raise ValueError(f"seed is {shown(value)}; want a whole number, 0 <= seed < 2^64")
    return int(value)


def one_of(name: str, value: Any, known: Collection[str]) -> str:
    """Return value. Raises: ValueError: it is not one of the known options."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {shown(value)}; want one of {', '.join(known)}")
    return value


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False
