"""Channels-last memory for tensors of any rank: [N, C, *spatial] by index, [N, *spatial, C] in memory.

Elements are numbered in memory order. torch's memory formats exist only for ranks 4 and 5; here sequences
[N, C, L] and vectors [N, D] follow the same rule.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """Return x with channels-last memory and strides; a view of x if it has such memory already.

    Strides are those of a new tensor, even where a dimension of size 1 would allow others: torch's kernels
    depend on them.
    """
    n, c, *spatial = x.shape
    flat = x.movedim(1, -1).reshape(-1)
    if flat.stride() != (1,):  # one channel out of several
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(n, *spatial, c).movedim(-1, 1)


def is_channels_last(x: Tensor) -> bool:
    """Whether x, [N, C, *spatial], is a dense [N, *spatial, C] in memory."""
    if x.ndim == 4:
        try:
            if x.is_contiguous(memory_format=torch.channels_last):  # torch has computed it already
                return True
        except RuntimeError:  # within torch.func.vmap
            pass
    return x.movedim(1, -1).is_contiguous()


def empty(n: int, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """An uninitialised [n, *shape] with channels-last memory. Args: shape: of one sample, channels first."""
    return torch.empty((n, *shape[1:], shape[0]), dtype=dtype, device=device).movedim(-1, 1)


def has_one_pixel_stride(x: Tensor) -> bool:
    """Whether three strides (entry, channel, pixel) suffice to address x: one stride serves all spatial dimensions."""
    return all(x.shape[i] == 1 or x.stride(i) == x.stride(-1) * x.shape[i + 1 :].numel() for i in range(2, x.ndim - 1))
