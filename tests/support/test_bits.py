"""The comparisons bit for bit detect every kind of damage."""

from math import nan

import pytest
import torch

from fastddpm.core import layout
from fastddpm.ops import FLOATS
from tests.support.bits import assert_same_bits, same_bits


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("damage", ["last bit", "sign of zero", "not written", "shape", "dtype", "layout"])
def test_damage_is_detected(damage, dtype):
    want = layout.channels_last(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]], dtype=dtype))
    got = want.clone()
    assert_same_bits(got, want)
    assert same_bits(got, want)
    if damage == "last bit":
        got[0, 1, 1] *= 1 + torch.finfo(dtype).eps
    elif damage == "sign of zero":
        got[0, 0, 0] = -0.0
    elif damage == "not written":
        got[0, 0, 1] = nan
    else:
        got = {"shape": got[:, :1], "dtype": got.double(), "layout": got.contiguous()}[damage]
    with pytest.raises(AssertionError):
        assert_same_bits(got, want)
    assert same_bits(got, want) == (damage == "layout")


def test_a_gradient_tensor_is_compared():
    assert same_bits(torch.ones(2, requires_grad=True), torch.ones(2))
