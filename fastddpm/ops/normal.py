"""Standard normals at addresses, as `core.noise` computes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.core import layout, noise
from fastddpm.ops.backend import launcher
from fastddpm.ops.checks import check_address, check_tensor
from fastddpm.ops.library import MAX_PER_SAMPLE, register


def normal(address: Tensor, shape: Sequence[int], *, stream: int, t: Tensor) -> Tensor:
    """Standard normals of N samples, each [*shape]: bit for bit `noise.normal`.

    Args:
        address: [N, 2] int64; (seed, sample index) of each entry, see `noise.address`.
        shape: of one sample, channels first.
        stream: 0 to 255: noise.STEP, START, TRAIN, LIKELIHOOD or a free one.
        t: [N] int64 on address's device, 0 <= t < 2^32. Unchecked: reading it would sync.
    Returns: [N, *shape] fp32 on address's device, channels-last.
    Raises: ValueError: a shape, dtype or device is not as above, or stream is out of range.
    """
    shape = tuple(shape)
    if not isinstance(address, Tensor) or not shape or torch.Size(shape).numel() > MAX_PER_SAMPLE:
        raise ValueError(
            f"normal: address is {type(address).__name__} and shape {shape}; want a tensor, and the shape of a sample "
            f"of at most {MAX_PER_SAMPLE} elements"
        )
    n = len(address) if address.ndim else 0
    check_address("normal", address, n, address.device)
    check_tensor("normal", "t", t, (n,), torch.int64, address.device, "the timestep of each entry")
    if not isinstance(stream, int) or not 0 <= stream < 256:
        raise ValueError(f"normal: stream is {stream!r}; want a whole number, 0 to 255")
    return torch.ops.fastddpm.normal(address, shape, stream, t)


def _normal(address: Tensor, shape: Sequence[int], stream: int, t: Tensor) -> Tensor:
    launch = launcher("normal", address.device)
    if launch is None:
        return noise.normal(address, shape, stream=stream, t=t)
    z = _normal_fake(address, shape)
    if z.numel():
        launch(z, t, address, stream=stream)
    return z


def _normal_fake(address: Tensor, shape: Sequence[int], *args: object) -> Tensor:
    return layout.empty(len(address), shape, dtype=torch.float32, device=address.device)


register("normal(Tensor address, SymInt[] shape, int stream, Tensor t) -> Tensor", _normal, _normal_fake)
