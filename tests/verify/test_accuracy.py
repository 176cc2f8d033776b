"""The verdict of a record, and the measures behind it."""

import math

import pytest
import torch

from fastddpm.verify.accuracy import Record, accuracy, unequal
from tests.support import check


def test_nan_and_infinity_never_pass():
    assert Record("r", "c").verdict == Record("r", "c", bound=1).verdict == "skipped"
    for error, bound in ((0, 0), (1.0, 1.0), (0.0, 5.0)):
        assert Record("r", "c", error, bound).verdict == "pass"
    for error, bound in ((1, 0), (1.01, 1), (math.nan, 1), (1, math.nan), (math.nan, math.nan), (math.inf, math.inf)):
        assert Record("r", "c", error, bound).verdict == "FAIL"
    assert Record("r", "c", 1, math.inf).verdict == "FAIL"


def test_unequal_bits_are_counted():
    want = torch.tensor([[0.0, 1.0], [2.0, math.nan]])
    assert unequal(want.clone(), want) == 0
    for place, value in (((0, 0), -0.0), ((0, 1), 1 + 2**-23), ((1, 0), math.nan)):
        got = want.clone()
        got[place] = value
        assert unequal(got, want) == 1
    assert unequal(want[:1], want) == unequal(want.double(), want) == math.inf
    assert unequal(torch.tensor([1, 3]), torch.tensor([1, 2])) == 1
    assert unequal(want.half(), want.half() + 1) == 3


@pytest.mark.parametrize("which", [0, 1, 2])
def test_accuracy_requires_equal_shapes(which):
    tensors = [torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3).double()]
    tensors[which] = tensors[which][:1]
    shapes = [tuple(x.shape) for x in tensors]
    message = check.error_line(accuracy, *tensors)
    assert message == f"ours is {shapes[0]}, plain {shapes[1]}, ref {shapes[2]}; want equal shapes"
