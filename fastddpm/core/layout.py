"""Channels-last for any rank: [N, C, *spatial] logical, [N, *spatial, C] physical; element index = physical position.

torch's memory formats know ranks 4 and 5 only; sequences [N, C, L] and vectors [N, D] follow the same rule here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """Return x with channels-last memory and strides; a view of x where its memory is so already.

    Strides are those of a fresh tensor, also where a dimension of size 1 would allow others: torch chooses by them.
    """
    n, c, *spatial = x.shape
    return x.movedim(1, -1).reshape(-1).view(n, *spatial, c).movedim(-1, 1)


def is_channels_last(x: Tensor) -> bool:
    """Whether [N, C, *spatial] x lies in memory as a dense [N, *spatial, C]."""
    return x.movedim(1, -1).is_contiguous()


def empty(n: int, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """Uninitialised [n, *shape] with channels-last memory; shape is that of one sample, channels first."""
    return torch.empty((n, *shape[1:], shape[0]), dtype=dtype, device=device).movedim(-1, 1)


def is_strided(x: Tensor) -> bool:
    """Whether three strides (entry, channel, pixel) address x: its spatial dimensions are dense among themselves."""
    return all(x.shape[i] == 1 or x.stride(i) == x.stride(-1) * x.shape[i + 1 :].numel() for i in range(2, x.ndim - 1))
