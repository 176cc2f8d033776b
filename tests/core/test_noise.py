"""The noise standard in torch: published bits, what an address means, and the statistics of the noise."""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastddpm.core import layout, noise

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
MASK = 0xFFFFFFFF
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


def bits(x: Tensor) -> list[str]:
    return [f"{word & MASK:08x}" for word in x.contiguous().view(torch.int32).tolist()]


def words(*hexadecimal: str) -> list[Tensor]:
    return [torch.tensor([int(word, 16)]) for word in hexadecimal]


def philox_of_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = right >> 32 ^ b ^ k, right & MASK, left >> 32 ^ d ^ m, left & MASK
        k, m = k + 0x9E3779B9 & MASK, m + 0xBB67AE85 & MASK
    return [a, b, c, d]


# The standard's bits


@pytest.mark.parametrize("case", VECTORS["philox4x32_10"])
def test_words_equal_the_published_vectors(case):
    got = noise.philox(*words(*case["counter"]), *words(*case["key"]))
    assert [f"{int(word):08x}" for word in got] == case["words"]


@pytest.mark.parametrize("case", VECTORS["box_muller"])
def test_box_muller_equals_the_vectors(case):
    assert bits(torch.cat(noise.box_muller(*words(case["u"], case["v"])))) == case["bits"]


@pytest.mark.parametrize("case", VECTORS["normals"])
def test_normals_equal_the_vectors(case):
    address = noise.address(case["seed"], [case["sample"]])
    assert bits(noise.normal(address, (case["count"],), stream=case["stream"], t=case["t"])[0]) == case["bits"]


def test_words_equal_philox_of_unbounded_integers():
    edges = [0, 1, 2**31 - 1, 2**31, MASK]
    drawn = torch.randint(0, 1 << 32, (200, 6), generator=torch.Generator().manual_seed(1)).tolist()
    cases = [[edge] * 6 for edge in edges] + drawn
    got = torch.stack(noise.philox(*torch.tensor(cases).T), -1)
    assert got.tolist() == [philox_of_integers(case[:4], case[4:]) for case in cases]


@pytest.mark.parametrize("seed", SEEDS)
def test_counter_and_key_have_the_standards_places(seed):
    stream, t = 255, 2**32 - 1
    samples = [0, 1, 2**32 - 1, 2**32, 2**40 + 17, 2**56 - 1]
    got = noise.normal(noise.address(seed, samples), (10,), stream=stream, t=t)
    for z, sample in zip(got, samples, strict=True):
        want = []
        for quad in range(3):
            counter = [quad, t, sample % 2**32, stream * 2**24 + sample // 2**32]
            u, v, u2, v2 = torch.tensor(philox_of_integers(counter, [seed % 2**32, seed // 2**32])).unsqueeze(1)
            want += [*noise.box_muller(u, v), *noise.box_muller(u2, v2)]
        assert torch.equal(z, torch.cat(want)[:10])


# What an address means


def test_seed_is_stored_in_twos_complement():
    want = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), -1]
    assert [int(noise.address(seed, [5])[0, 0]) for seed in SEEDS] == want
    assert noise.address(7, 3).tolist() == [[7, 0], [7, 1], [7, 2]]
    assert torch.equal(noise.address(7, iter([4, 9])), noise.address(7, torch.tensor([4, 9])))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 1), (3, 5, 7), (4, 6), (5, 3), (1,), (13,)])
def test_elements_are_numbered_in_channels_last_order(shape):
    address = noise.address(3, 4)
    z = noise.normal(address, shape, stream=noise.STEP, t=17)
    assert z.shape == (4, *shape)
    assert z.dtype == torch.float32
    assert layout.is_channels_last(z)
    flat = noise.normal(address, (math.prod(shape),), stream=noise.STEP, t=17)
    assert torch.equal(z.movedim(1, -1).flatten(1), flat)


@pytest.mark.parametrize("count", range(1, 10))
def test_a_shorter_sample_begins_like_a_longer_one(count):
    address = noise.address(3, 2)
    whole = noise.normal(address, (40,), stream=noise.STEP, t=1)
    assert torch.equal(noise.normal(address, (count,), stream=noise.STEP, t=1), whole[:, :count])


def test_a_sample_is_the_same_in_any_batch():
    address = torch.cat([noise.address(seed, [0, 3, 2**32, 2**40 + 1]) for seed in SEEDS])
    t = torch.arange(len(address)) * 31
    together = noise.normal(address, (3, 4, 5), stream=noise.STEP, t=t)
    for i in range(len(address)):
        alone = noise.normal(address[i : i + 1], (3, 4, 5), stream=noise.STEP, t=int(t[i]))
        assert torch.equal(alone[0], together[i])
    pick = torch.randperm(len(address), generator=torch.Generator().manual_seed(2))[:7]
    assert torch.equal(noise.normal(address[pick], (3, 4, 5), stream=noise.STEP, t=t[pick]), together[pick])


def test_one_t_for_all_equals_the_same_t_for_each():
    address = noise.address(5, 3)
    want = noise.normal(address, (2, 3), stream=noise.START, t=1000)
    for t in (
        torch.tensor(1000),
        torch.tensor([1000]),
        torch.full((3,), 1000),
        torch.full((3,), 1000, dtype=torch.int32),
    ):
        assert torch.equal(noise.normal(address, (2, 3), stream=noise.START, t=t), want)


def test_no_samples_or_elements_give_empty_noise():
    assert noise.normal(noise.address(0, 0), (3, 4, 4), stream=noise.STEP, t=0).shape == (0, 3, 4, 4)
    assert noise.normal(noise.address(0, 2), (3, 0, 4), stream=noise.STEP, t=0).shape == (2, 3, 0, 4)


def test_bits_do_not_depend_on_the_number_of_threads():
    address, threads = noise.address(11, 16), torch.get_num_threads()
    try:
        got = [
            (torch.set_num_threads(n), noise.normal(address, (3, 64, 64), stream=noise.STEP, t=5))[1] for n in (1, 2, 3)
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bits_do_not_depend_on_the_device():
    address = noise.address(2**64 - 1, [0, 1, 2**40])
    want = noise.normal(address, (3, 64, 64), stream=noise.STEP, t=5)
    assert torch.equal(noise.normal(address.cuda(), (3, 64, 64), stream=noise.STEP, t=5).cpu(), want)


def test_square_root_by_float64_is_correctly_rounded():
    """For every significand and both parities of the exponent: all float32 numbers, up to powers of 4."""
    for bits in torch.arange(0x3F800000, 0x40800000, dtype=torch.int32).split(1 << 22):
        value = bits.view(torch.float32)
        ours = value.double().sqrt().float()
        assert np.array_equal(ours.numpy(), np.sqrt(value.numpy()))


@pytest.mark.parametrize(
    ("seed", "samples", "message"),
    [
        (-1, 1, "seed is -1"),
        (1 << 64, 1, "seed is 18446744073709551616"),
        (0.5, 1, "seed is 0.5"),
        (True, 1, "seed is True"),
        ("7", 1, "seed is '7'"),
        (0, -3, "samples is -3"),
        (0, [3, -1], "sample index is -1"),
        (0, [1 << 56], "sample index is 72057594037927936"),
        (0, [0.5], "sample index is 0.5"),
        (0, torch.tensor([-1]), "sample index is -1"),
        (0, torch.tensor([1 << 56]), "sample index is 72057594037927936"),
        (0, torch.zeros(2, 2, dtype=torch.int64), r"sample indices are \(2, 2\) torch.int64"),
        (0, torch.zeros(2), r"sample indices are \(2,\) torch.float32"),
    ],
)
def test_address_rejects(seed, samples, message):
    with pytest.raises(ValueError, match=f"^{message}.*$"):
        noise.address(seed, samples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"address": torch.zeros(2, 3, dtype=torch.int64)}, r"address is \(2, 3\) torch.int64"),
        ({"address": torch.zeros(2, dtype=torch.int64)}, r"address is \(2,\) torch.int64"),
        ({"address": torch.zeros(2, 2)}, r"address is \(2, 2\) torch.float32"),
        ({"shape": ()}, r"shape is \(\)"),
        ({"shape": (3, -1)}, r"shape is \(3, -1\)"),
        ({"stream": -1}, "stream is -1"),
        ({"stream": 256}, "stream is 256"),
        ({"stream": 0.5}, "stream is 0.5"),
        ({"stream": None}, "stream is None"),
        ({"shape": (2.5,)}, r"shape is \(2.5,\)"),
        ({"t": None}, "t is None"),
        ({"t": torch.ones(2, dtype=torch.bool)}, r"t is \(2,\) torch.bool"),
        ({"t": -1}, "t is -1"),
        ({"t": 1 << 32}, "t is 4294967296"),
        ({"t": 1.5}, "t is 1.5"),
        ({"t": torch.tensor([1, 2, 3])}, r"t is \(3,\) torch.int64"),
        ({"t": torch.tensor([1.0, 2.0])}, r"t is \(2,\) torch.float32"),
    ],
)
def test_normal_rejects(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}.*$"):
        noise.normal(**{"address": noise.address(0, 2), "shape": (4,), "stream": 0, "t": 0, **arguments})


# The accuracy of the fixed polynomials


def box_muller_float64(f: Tensor, v: Tensor) -> Tensor:
    """Box-Muller in float64. Args: f: u + 0.5; v: the angle, a quadrant and a signed fraction of one."""
    turn = (v >> 30) + (v << 34 >> 34).double() / 2**30
    angle, r = turn * (math.pi / 2), (-2 * (f / 2**32).log()).sqrt()
    return torch.stack([r * angle.cos(), r * angle.sin()])


def radius_words() -> Tensor:
    """Values of u: both ends, all powers of 2, and a random sample."""
    near = torch.arange(1 << 16)
    powers = (1 << torch.arange(32)).unsqueeze(1) + torch.arange(-64, 64)
    drawn = torch.randint(0, 1 << 32, (1 << 20,), generator=torch.Generator().manual_seed(3))
    return torch.cat([near, MASK - near, powers.flatten().clamp(0, MASK), drawn])


def test_box_muller_is_close_to_float64():
    u = radius_words()
    v = torch.randint(0, 1 << 32, u.shape, generator=torch.Generator().manual_seed(4))
    got = torch.stack(noise.box_muller(u, v)).double()
    # the standard rounds u + 0.5 to binary32; the other errors are those of the polynomials
    assert (got - box_muller_float64((u.float() + 0.5).double(), v)).abs().max() <= 1.4e-5
    # where u is close to 2^32, that rounding changes the radius, which is close to 0
    exact = (got - box_muller_float64(u + 0.5, v)).abs().amax(0)
    assert exact[u <= 2**32 - 2**14].max() <= 1.4e-5
    assert exact.max() <= math.sqrt(-2 * math.log1p(-128 / 2**32))


def test_largest_magnitude():
    u = radius_words()
    v = torch.arange(len(u)) % 4 << 30  # on the axes, where one of the two normals is the radius
    magnitude = torch.stack(noise.box_muller(u, v)).abs().amax(0)
    assert magnitude.max() == magnitude[u == 0].max()
    assert f"{float(magnitude.max()):.2f}" == "6.76"


# Statistics. The seeds are fixed, so a test passes always or never. With another seed, correct noise would fail a test
# with probability ALPHA, which is divided among the test's comparisons (Bonferroni).

ALPHA = 1e-3
N = 1 << 20


def assert_normal_moments(*samples: Tensor) -> None:
    """Assert that the first four moments are those of N(0, 1); x^k has the variance E x^2k - (E x^k)^2."""
    limit = stats.norm.isf(ALPHA / (4 * len(samples)) / 2)
    for x in samples:
        for k, (mean, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96)), 1):
            score = abs(float(x.double().pow(k).mean()) - mean) * math.sqrt(x.numel() / variance)
            assert score <= limit, f"moment {k} is {score:.1f} standard errors off"


def assert_normal_distribution(*samples: Tensor) -> None:
    """Assert that the distribution is N(0, 1), by Kolmogorov-Smirnov."""
    for x in samples:
        assert stats.kstest(x.flatten().numpy(), "norm", method="asymp").pvalue >= ALPHA / len(samples)


def assert_uncorrelated(*pairs: tuple[Tensor, Tensor]) -> None:
    """Assert that neither values nor squares of a pair are correlated: for n correct values, r tends to N(0, 1/n)."""
    limit = stats.norm.isf(ALPHA / (2 * len(pairs)) / 2)
    for x, y in pairs:
        for power in (1, 2):
            a, b = (part.double().flatten() ** power for part in (x, y))
            a, b = a - a.mean(), b - b.mean()
            score = abs(float(a @ b / (a.norm() * b.norm()))) * math.sqrt(len(a))
            assert score <= limit, f"power {power}: {score:.1f} standard errors off"


def drawn(address: Tensor, count: int, stream: int = noise.STEP, t: int | Tensor = 500) -> Tensor:
    return noise.normal(address, (count,), stream=stream, t=t)


def neighbours(kind: str) -> Tensor:
    """[64, N / 64]: the addresses of the rows differ only in what kind names."""
    count, one = N // 64, noise.address(2024, [7])
    if kind == "samples":
        return drawn(noise.address(2024, 64), count)
    if kind == "samples far apart":
        return drawn(noise.address(2024, torch.arange(64) << 32), count)
    if kind == "seeds":
        return drawn(torch.cat([noise.address(seed, [7]) for seed in range(64)]), count)
    if kind == "seeds far apart":
        return drawn(torch.cat([noise.address(seed << 32, [7]) for seed in range(64)]), count)
    if kind == "steps":
        return drawn(one.expand(64, 2), count, t=torch.arange(64))
    if kind == "streams":
        return torch.cat([drawn(one, count, stream=stream) for stream in range(64)])
    return drawn(one, N).view(-1, 64).T  # elements


@pytest.fixture(scope="module")
def many() -> Tensor:
    return drawn(noise.address(31337, 64), N // 64).flatten()


@pytest.fixture(scope="module")
def quads(many) -> Tensor:
    """[4, N / 4]: each column is from one Philox call."""
    return many.view(-1, 4).T


def test_moments_are_normal(many, quads):
    assert_normal_moments(many, *quads)


def test_distribution_is_normal(many, quads):
    assert_normal_distribution(many, *quads)


def test_the_four_normals_of_a_call_are_uncorrelated(quads):
    assert_uncorrelated(*combinations(quads, 2))


@pytest.mark.parametrize(
    "kind", ["samples", "samples far apart", "seeds", "seeds far apart", "steps", "streams", "elements"]
)
def test_neighbours_are_uncorrelated(kind):
    z = neighbours(kind)
    assert_uncorrelated(*((z[:-lag], z[lag:]) for lag in (1, 2, 3, 4, 5, 8, 16, 32)))


def test_addresses_that_differ_in_one_bit_are_uncorrelated():
    count = 1 << 15
    here = drawn(noise.address(2**63 + 5, [9]), count, t=500)[0]
    seeds = [drawn(noise.address((2**63 + 5) ^ 1 << bit, [9]), count) for bit in range(64)]
    samples = [drawn(noise.address(2**63 + 5, [9 ^ 1 << bit]), count) for bit in range(56)]
    steps = [drawn(noise.address(2**63 + 5, [9]), count, t=500 ^ 1 << bit) for bit in range(32)]
    streams = [drawn(noise.address(2**63 + 5, [9]), count, stream=1 << bit) for bit in range(8)]
    others = torch.cat(seeds + samples + steps + streams)
    assert len(others) == 64 + 56 + 32 + 8
    assert_uncorrelated(*((here, other) for other in others))


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x + 0.01,
        lambda x: x * 1.01,
        lambda x: torch.where(x > 0, x * 1.02, x),
        lambda x: x.clamp(-3, 3),
        lambda x: torch.where(torch.arange(len(x)) == 5, math.nan, x),
    ],
    ids=["shifted", "scaled", "skewed", "without tails", "one NaN"],
)
def test_moments_of_damaged_noise_fail(many, damage):
    with pytest.raises(AssertionError):
        assert_normal_moments(damage(many))


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x + 0.01,
        lambda x: x * 1.01,
        lambda x: torch.where(x > 0, x * 1.02, x),
        lambda x: torch.where(x.abs() < 0.01, 0, x),
        lambda x: math.sqrt(3) * (2 * torch.special.ndtr(x) - 1),
        lambda x: torch.where(torch.arange(len(x)) == 5, math.nan, x),
    ],
    ids=["shifted", "scaled", "skewed", "rounded to 0", "uniform", "one NaN"],
)
def test_distribution_of_damaged_noise_fails(many, damage):
    with pytest.raises(AssertionError):
        assert_normal_distribution(damage(many))


@pytest.mark.parametrize(
    "damage",
    [
        lambda x, y: 0.01 * x + math.sqrt(1 - 0.01**2) * y,
        lambda x, y: torch.where(torch.arange(len(y)) % 100 == 0, x, y),
        lambda x, y: x,
        lambda x, y: -x,
        lambda x, y: x.abs() * y.sign(),
        lambda x, y: torch.where(torch.arange(len(y)) == 5, math.nan, y),
    ],
    ids=["correlated 1 %", "1 % repeated", "repeated", "mirrored", "same magnitudes", "one NaN"],
)
def test_correlation_of_damaged_noise_fails(many, damage):
    other = drawn(noise.address(99, 64), N // 64).flatten()
    assert_uncorrelated((many, other))
    with pytest.raises(AssertionError):
        assert_uncorrelated((many, damage(many, other)))
