"""The noise standard in Triton: the published bits, and those of `fastddpm.core.noise` at random addresses."""

import json
from pathlib import Path

import pytest
import torch

from fastddpm.core import noise

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastddpm.kernels.philox import box_muller, normals, philox  # noqa: E402

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
EDGES = [0, 1, 2, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 0xB504F333, 2**32 - 2**8, 2**32 - 2**7, 2**32 - 1]
EDGES += [quadrant << 30 for quadrant in (1, 3)] + [(quadrant << 30) + (1 << 29) for quadrant in range(4)]


@triton.jit
def philox_kernel(out_ptr, counter_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < n
    c0 = tl.load(counter_ptr + i * 6, mask=mask).to(tl.uint32)
    c1 = tl.load(counter_ptr + i * 6 + 1, mask=mask).to(tl.uint32)
    c2 = tl.load(counter_ptr + i * 6 + 2, mask=mask).to(tl.uint32)
    c3 = tl.load(counter_ptr + i * 6 + 3, mask=mask).to(tl.uint32)
    k0 = tl.load(counter_ptr + i * 6 + 4, mask=mask).to(tl.uint32)
    k1 = tl.load(counter_ptr + i * 6 + 5, mask=mask).to(tl.uint32)
    c0, c1, c2, c3 = philox(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + i * 4, c0.to(tl.int64), mask=mask)
    tl.store(out_ptr + i * 4 + 1, c1.to(tl.int64), mask=mask)
    tl.store(out_ptr + i * 4 + 2, c2.to(tl.int64), mask=mask)
    tl.store(out_ptr + i * 4 + 3, c3.to(tl.int64), mask=mask)


@triton.jit
def box_muller_kernel(out_ptr, word_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    u, v = tl.load(word_ptr + i * 2, mask=mask), tl.load(word_ptr + i * 2 + 1, mask=mask)
    cos, sin = box_muller(u.to(tl.uint32), v.to(tl.uint32))
    tl.store(out_ptr + i * 2, cos, mask=mask)
    tl.store(out_ptr + i * 2 + 1, sin, mask=mask)


@triton.jit
def normals_kernel(out_ptr, address_ptr, t_ptr, count, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    n, block = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    seed, sample = tl.load(address_ptr + 2 * n), tl.load(address_ptr + 2 * n + 1)
    z = normals(seed, STREAM, sample, tl.load(t_ptr + n), block, BLOCK)
    tl.store(out_ptr + n * count + i, z, mask=i < count)


def words_of(counters, device):
    """[K, 6] counters and keys -> [K, 4] words, unsigned 32-bit values in int64."""
    out = torch.full((len(counters), 4), -1, device=device)
    block = triton.next_power_of_2(len(counters))
    philox_kernel[(1,)](out, counters.to(device), len(counters), BLOCK=block)
    return out.cpu()


def pairs_of(words, device):
    """[K, 2] words -> [K, 2] fp32."""
    out = torch.full(words.shape, torch.nan, device=device)
    box_muller_kernel[triton.cdiv(len(words), 4096),](
        out, words.to(device), len(words), BLOCK=4096, enable_fp_fusion=False
    )
    return out.cpu()


def normals_of(address, count, device, *, stream, t):
    """[N, count] fp32; t is [N] int64."""
    out = torch.full((len(address), count), torch.nan, device=device)
    normals_kernel[len(address), triton.cdiv(count, 256)](
        out, address.to(device), t.to(device), count, STREAM=stream, BLOCK=256, enable_fp_fusion=False
    )
    return out.cpu()


def numbers(hexadecimal):
    return [int(word, 16) for word in hexadecimal]


def bits(x):
    return (x.view(torch.int32).long() & 0xFFFFFFFF).tolist()


def test_words_equal_the_published_vectors(kernel_device):
    cases = VECTORS["philox4x32_10"]
    counters = torch.tensor([numbers(case["counter"] + case["key"]) for case in cases])
    assert words_of(counters, kernel_device).tolist() == [numbers(case["words"]) for case in cases]


def test_box_muller_equals_the_vectors(kernel_device):
    cases = VECTORS["box_muller"]
    words = torch.tensor([numbers((case["u"], case["v"])) for case in cases])
    assert bits(pairs_of(words, kernel_device)) == [numbers(case["bits"]) for case in cases]


@pytest.mark.parametrize("case", VECTORS["normals"])
def test_normals_equal_the_vectors(case, kernel_device):
    address, t = noise.address(case["seed"], [case["sample"]]), torch.tensor([case["t"]])
    z = normals_of(address, case["count"], kernel_device, stream=case["stream"], t=t)
    assert bits(z[0]) == numbers(case["bits"])


def test_words_equal_those_of_torch(kernel_device):
    drawn = torch.randint(1 << 32, (1000, 6), generator=torch.Generator().manual_seed(1))
    edges = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])[torch.arange(5 * 6).reshape(5, 6) % 5]
    counters = torch.cat([drawn, edges])
    assert torch.equal(words_of(counters, kernel_device), torch.stack(noise.philox(*counters.unbind(1)), 1))


def test_box_muller_equals_that_of_torch(kernel_device):
    drawn = torch.randint(1 << 32, (1 << 17, 2), generator=torch.Generator().manual_seed(2))
    words = torch.cat([torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES)), drawn])
    want = torch.stack(noise.box_muller(*words.unbind(1)), 1)
    assert bits(pairs_of(words, kernel_device)) == bits(want)


@pytest.mark.parametrize("stream", [0, 3, 255])
@pytest.mark.parametrize("count", [1, 6, 385])
def test_normals_equal_those_of_torch(count, stream, kernel_device):
    drawn = torch.Generator().manual_seed(count + stream)
    address = torch.randint(-(1 << 63), (1 << 63) - 1, (10, 2), generator=drawn)
    address[:, 1] &= (1 << 56) - 1
    t = torch.randint(1000, (10,), generator=drawn)
    z = normals_of(address, count, kernel_device, stream=stream, t=t)
    assert bits(z) == bits(noise.normal(address, (count,), stream=stream, t=t))
