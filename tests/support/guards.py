"""Tensors between guard regions, which show a write outside a tensor."""

from math import nan, prod

import torch

__all__ = ["GUARD", "Guards"]

GUARD = 64  # elements: keeps the alignment of the allocation


class Guards:
    """Makes tensors inside memory filled with NaN, as `layout.empty` does; `check` finds writes around them."""

    def __init__(self):
        self.buffers = []

    def empty(self, n, shape, *, dtype, device=None):
        size = n * prod(shape)
        buffer = torch.full((size + 2 * GUARD,), nan, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + size].view(n, *shape[1:], shape[0]).movedim(-1, 1)

    def holding(self, x, device):
        """A copy of x on a device."""
        return self.empty(len(x), x.shape[1:], dtype=x.dtype, device=device).copy_(x)

    def check(self):
        for buffer in self.buffers:
            assert buffer[:GUARD].isnan().all()
            assert buffer[-GUARD:].isnan().all()
