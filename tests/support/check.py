"""Checks that several tests share: accuracy relative to plain torch, errors of one line, calls from several threads."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.verify.accuracy import accuracy, root_mean_square

__all__ = ["TINY", "assert_as_accurate", "at_once", "error_line", "root_mean_square"]

# options of a small U-Net
TINY = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def assert_as_accurate(ours: Tensor, plain: Tensor, ref: Tensor) -> None:
    """Assert that ours errs at most twice as much as plain torch, in the largest error and in the root mean square.

    Args:
        ours: the result.
        plain: the result of plain torch in the same dtype; an error below half a unit in the last place counts as that.
        ref: the result in float64.
    """
    assert ours.shape == plain.shape == ref.shape
    assert ref.dtype == torch.float64
    for measure, error, bound in accuracy(ours, plain, ref):
        assert error <= bound < math.inf, f"{measure} error is {error:.3g}, twice plain torch's {bound:.3g}"


def at_once(*functions: Callable[[], Any], times: int = 3) -> list[list[Any]]:
    """The results of each function, called `times` times in its own thread; the threads start together."""
    start = threading.Barrier(len(functions))

    def call(function: Callable[[], Any]) -> list[Any]:
        start.wait()
        return [function() for _ in range(times)]

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(call, functions))


def error_line(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The text of the ValueError that the call must raise; asserts that it is one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers compare the text)
        function(*args, **kwargs)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text
