"""Channels-last memory: which tensors have it."""

import itertools

import pytest
import torch

from fastddpm.core import layout

SHAPES = [(2, 3, 4, 5), (1, 1, 4, 4), (2, 1, 1, 3), (1, 3, 1, 1), (0, 3, 4, 4), (2, 3, 5), (2, 3), (2, 3, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_channels_last_judges_the_order_of_memory(shape):
    for order in itertools.permutations(range(len(shape))):
        x = torch.zeros([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
        for view in (x, x[::2], x[:, :1], x[..., ::2]):
            assert layout.is_channels_last(view) == view.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_last_is_dense_whatever_the_strides(shape):
    """Also of one channel out of several, whose elements are equally far apart."""
    whole = torch.arange(2.0 * torch.Size(shape).numel()).reshape(shape[0], 2 * shape[1], *shape[2:])
    for x in (whole, layout.channels_last(whole), whole[::2], whole[..., ::2]):
        for view in (x, x[:, :1], x[:, 1:2], x[:, : shape[1]], x[:, shape[1] :]):
            got = layout.channels_last(view)
            assert torch.equal(got, view)
            assert got.stride() == layout.empty(len(view), view.shape[1:], dtype=view.dtype).stride()


def test_is_channels_last_answers_within_vmap():
    answers = []
    torch.func.vmap(lambda x: answers.append(layout.is_channels_last(x)) or x)(torch.zeros(2, 2, 3, 4, 4))
    assert answers == [False]
