"""The noise standard in Triton: standard normals in registers, for use inside kernels.

Traffic: a seed and a sample index per program.
Precision: 32-bit integers and IEEE binary32 in the written order; launch with enable_fp_fusion=False.
Spec: fastddpm/core/noise.py, the same operations in torch.
Proof: tests/kernels/test_philox.py (the bits of published vectors and of random addresses).
"""

import math

import triton
import triton.language as tl

STEP_STREAM = tl.constexpr(0)  # fastddpm.core.noise.STEP
KNOWN_STREAM = tl.constexpr(4)  # fastddpm.core.noise.KNOWN

_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_ANGLE = tl.constexpr(math.pi / 2 / (1 << 24))
_LOG = tl.constexpr(
    (
        *(-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
        *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    )
)


@triton.jit
def entry_normals(n, stream, t, block, address_ptr, BLOCK: tl.constexpr):
    """`normals` of entry n of a batch. Args: address_ptr: [N, 2] int64, (seed, sample index) of each entry."""
    seed, sample = tl.load(address_ptr + 2 * n), tl.load(address_ptr + 2 * n + 1)
    return normals(seed, stream, sample, t, block, BLOCK)


@triton.jit
def normals(seed, stream, sample, t, block, BLOCK: tl.constexpr):
    """Standard normals of one block of BLOCK consecutive elements of a sample: [BLOCK] fp32.

    Args: seed, sample: int64 scalars; stream, t: integer scalars; block: int32 scalar, which block of the sample.
    """
    quad = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    key = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    high = (sample >> 32) + (stream << 24)
    u, v, u2, v2 = philox(quad.to(tl.uint32), t.to(tl.uint32), sample.to(tl.uint32), high.to(tl.uint32), key[0], key[1])
    cos, sin = box_muller(tl.join(u, u2), tl.join(v, v2))
    return tl.join(cos, sin).reshape(BLOCK)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: the four words of each counter under its key, all uint32."""
    for r in tl.static_range(10):
        if r > 0:
            k0 += 0x9E3779B9
            k1 += 0xBB67AE85
        p0 = c0.to(tl.uint64) * 0xD2511F53  # one wide multiply gives both halves; umulhi and * would take two
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def box_muller(u, v):
    """Two uint32 words -> (r cos a, r sin a) in fp32."""
    f = u.to(tl.float32) + 0.5
    i = f.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    e = (i >> 23) - 32
    m = ((i & 0x007FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    z = m * m
    p = 7.0376836292e-2
    for k in tl.static_range(8):
        p = p * m + _LOG[k]
    ln = ((p * m) * z - 0.5 * z) + m
    ln = ln + e.to(tl.float32) * 0.6931471805599453
    r = tl.sqrt_rn(-2.0 * ln)

    w = ((v.to(tl.int32, bitcast=True) << 2) >> 8).to(tl.float32) * _ANGLE
    w2 = w * w
    s = ((-1.9515295891e-4 * w2 + 8.3321608736e-3) * w2 + -1.6666654611e-1) * w2 * w + w
    c = ((2.443315711809948e-5 * w2 + -1.388731625493765e-3) * w2 + 4.166664568298827e-2) * (w2 * w2) - 0.5 * w2 + 1.0
    odd = (v & 0x40000000) != 0  # the quadrant v >> 30 is odd
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return r * _flip(cos, v + 0x40000000), r * _flip(sin, v)


@triton.jit
def _flip(x, v):
    """x with its sign flipped where the top bit of v is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (v & 0x80000000)).to(tl.float32, bitcast=True)
