"""A damaged result does not pass."""

import math

import pytest
import torch

from tests.support.exact import assert_close


def test_a_damaged_result_is_not_close():
    want = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    assert_close(want * (1 + 1e-13), want)
    for damaged in (want * (1 + 3e-12), want + torch.tensor([0, 0, 3e-12]), want * math.nan, want[:2], want.float()):
        with pytest.raises(AssertionError):
            assert_close(damaged, want)
