"""The noise standard, version 1: z is a pure function of (seed, stream, sample, t, element), the same bits everywhere.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives random words;
Box-Muller with fixed polynomials (coefficients from Cephes, S. Moshier) turns them into normals. Every operation has
the result of one IEEE binary32 or 32-bit integer operation, in the written order, so `fastddpm.kernels.philox` gives
the same bits in Triton.
"""

import math
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from fastddpm.core import checks
from fastddpm.core.checks import checked_call, is_whole, shown, whole
from fastddpm.core.precision import named_device

STEP, START, TRAIN, LIKELIHOOD = 0, 1, 2, 3  # streams: z of a reverse step; x_T; eps in training; eps in likelihood
KNOWN, RENOISE = 4, 5  # z of the known part of x_{t-1}; z on the way back from x_{t-1} to x_t
COUPLING = 6  # u, which decides whether a draft is accepted in sampling parallel in time
CODES = 255  # the embeddings of text, and the first phases of sounds
VISIT = 1 << 20  # is added to t in each further visit of a timestep; more than any number of timesteps

END = 1 << 56  # of the sample indices
MOST_SAMPLES = 1 << 28  # that a number may ask for: their addresses are 4 GB

_MASK = 0xFFFFFFFF
_SQRT_HALF_BITS = 0x3F3504F3
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)


@checked_call
def address(seed: int, samples: int | Iterable[int] | Tensor, device: torch.device | str | None = None) -> Tensor:
    """The addresses of samples of one seed: [N, 2] int64 of (seed, sample index).

    Args:
        seed: 0 <= seed < 2^64; stored in two's complement.
        samples: their number N (the indices are then 0 to N - 1), or the indices, each 0 <= index < 2^56.
    Raises: ValueError: seed or an index is out of range or not a whole number, or device is not one.
    """
    there = None if device is None else named_device(device)
    seed, indices = checks.seed(seed), _indices(samples)
    out = torch.empty(len(indices), 2, dtype=torch.int64, device="cpu")
    out[:, 0] = seed - (1 << 64) if seed >> 63 else seed
    out[:, 1] = indices
    return out.to(there)


def _indices(samples: Any) -> Tensor:
    """The sample indices that `address` is given: [N] int64 on the CPU."""
    if is_whole(samples):
        whole("samples", samples, 0, MOST_SAMPLES)
        return torch.arange(int(samples), device="cpu")
    if isinstance(samples, Tensor):
        integers = not (samples.is_floating_point() or samples.is_complex() or samples.dtype == torch.bool)
        if samples.ndim != 1 or not integers or samples.layout != torch.strided or samples.is_meta:
            raise ValueError(f"sample indices are {tuple(samples.shape)} {samples.dtype}; want [N] whole numbers")
        indices = samples.to("cpu", torch.int64)
        outside = indices[(indices < 0) | (indices >= END)].tolist()
    else:
        is_text = isinstance(samples, bool | str | bytes)
        if is_text or not isinstance(samples, Iterable) or not getattr(samples, "ndim", 1):
            raise ValueError(f"samples is {shown(samples)}; want a number of samples, or a list of sample indices")
        if isinstance(samples, Sized):  # a range may be too long to list
            whole("the number of samples", len(samples), 0, MOST_SAMPLES)
        given = list(samples)
        outside = [index for index in given if not is_whole(index) or not 0 <= index < END]
        indices = torch.tensor([] if outside else given, dtype=torch.int64, device="cpu")
    if outside:
        raise ValueError(f"sample index is {shown(outside[0])}; want a whole number, 0 <= index < 2^56")
    return indices


@checked_call
def normal(address: Tensor, shape: Sequence[int], *, stream: int, t: int | Tensor) -> Tensor:
    """Standard normals of N samples, each [*shape].

    Args:
        address: [N, 2] int64: (seed, sample index) of each; the unsigned 64-bit seed in two's complement,
            0 <= index < 2^56. Unchecked: reading it would sync.
        shape: of one sample, channels first: (C, H, W), (C, L) or (D,).
        stream: 0 to 255, the purpose of the noise: STEP, START, ... or RENOISE; 128 to 254 are free for users.
        t: timestep, an int or [N] integers; 0 <= t < 2^32. Unchecked in a tensor: reading it would sync.
    Returns: float32 [N, *shape] on address's device, channels-last in memory.
    Raises: ValueError: an argument is not as above.
    """
    if not isinstance(address, Tensor):
        raise ValueError(f"address is {shown(address)}; want [N, 2] int64, as `noise.address` returns it")
    if address.ndim != 2 or address.shape[1] != 2 or address.dtype != torch.int64:
        raise ValueError(f"address is {tuple(address.shape)} {address.dtype}; want [N, 2] int64 (seed, sample index)")
    whole("stream", stream, 0, 255)
    sizes = tuple(shape) if isinstance(shape, Iterable) and not isinstance(shape, str | bytes) else ()
    if not sizes or not all(is_whole(size) and size >= 0 for size in sizes):
        raise ValueError(f"shape is {shown(shape)}; want that of one sample: (C, H, W), (C, L) or (D,)")
    n, count = len(address), math.prod(sizes)
    if isinstance(t, Tensor):
        if t.shape not in ((n,), (1,), ()) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"t is {tuple(t.shape)} {t.dtype}; want an int, or [{n}] integers like address")
        t = t.to(address.device, torch.int64).reshape(-1, 1) & _MASK
    elif not is_whole(t) or not 0 <= t < 1 << 32:
        raise ValueError(f"t is {shown(t)}; want a whole number, 0 <= t < 2^32")
    seed, sample = address[:, :1], address[:, 1:]
    words = philox(
        torch.arange((count + 3) // 4, device=address.device),
        t,
        sample & _MASK,
        (stream << 24) + (sample >> 32 & 0xFFFFFF),
        seed & _MASK,
        seed >> 32 & _MASK,
    )
    u, v, u2, v2 = torch.broadcast_tensors(*words)
    z = torch.stack([*box_muller(u, v), *box_muller(u2, v2)], -1).flatten(1)[:, :count].contiguous()
    return z.reshape(n, *sizes[1:], sizes[0]).movedim(-1, 1)


def uniform(address: Tensor, *, stream: int, t: Tensor) -> Tensor:
    """One uniform number, 0 < u <= 1, for each sample: (w + 0.5) / 2^32, where w is the first word of element 0.

    Args: address: [N, 2] int64; t: [N] int64.
    Returns: [N] float32.
    """
    seed, sample = address.unbind(1)
    high = (stream << 24) + (sample >> 32 & 0xFFFFFF)
    word, *_ = philox(torch.zeros_like(t), t, sample & _MASK, high, seed & _MASK, seed >> 32 & _MASK)
    return (word.float() + 0.5) * 2.0**-32


def philox(c0, c1, c2, c3, k0, k1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words for each counter (c0 to c3) and key (k0, k1).

    All are unsigned 32-bit values in int64; the arguments are broadcast.
    """
    for r in range(10):
        if r:
            k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
        # int64 products may wrap, but their 64 bits are those of the unsigned product
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
    return c0, c1, c2, c3


def box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two random words, unsigned 32-bit values in int64, -> two normals (r cos a, r sin a) in float32.

    r = sqrt(-2 ln((u + 0.5) / 2^32)); a = (q + f) pi/2, where q is the upper two bits of v, and f the other 30
    bits as a signed fraction.
    """
    f = u.float() + 0.5
    i = f.view(torch.int32) - _SQRT_HALF_BITS
    e = (i >> 23) - 32
    m = ((i & 0x007FFFFF) + _SQRT_HALF_BITS).view(torch.float32) - 1
    z = m * m
    p = m * _LOG[0] + _LOG[1]
    for k in _LOG[2:]:
        p = p * m + k
    ln = ((p * m) * z - 0.5 * z) + m
    ln = ln + e.float() * 0.6931471805599453
    # torch's square roots on a CPU can be one unit off, in float32 and in float64. But the root of a float32 number is
    # never so close to the midpoint of two float32 numbers that a float64 root, one unit off, rounds to the wrong one
    r = (-2 * ln).double().sqrt().float()

    q = v >> 30
    w = ((v.int() << 2) >> 8).float() * (math.pi / 2 / (1 << 24))
    w2 = w * w
    s = ((-1.9515295891e-4 * w2 + 8.3321608736e-3) * w2 + -1.6666654611e-1) * w2 * w + w
    c = ((2.443315711809948e-5 * w2 + -1.388731625493765e-3) * w2 + 4.166664568298827e-2) * (w2 * w2) - 0.5 * w2 + 1
    odd = (q & 1).bool()
    cos, sin = torch.where(odd, s, c), torch.where(odd, c, s)
    cos = torch.where((q + 1 & 2).bool(), -cos, cos)
    sin = torch.where((q & 2).bool(), -sin, sin)
    return r * cos, r * sin
