"""`ops.conditional_step` in torch, C++, the Triton interpreter and on a GPU: the bits of the reference."""

import re
from dataclasses import replace
from math import inf, nan

import pytest
import torch

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.schedule import Schedule
from fastddpm.reference.diffusion import deviation, exponential, guided, replaced, update
from tests.support.bits import assert_same_bits, same_bits
from tests.support.draws import POSITIONS, addresses, generator, numpy_warns, positions, step_inputs

TABLES = {kind: Schedule(variance_type=kind).table() for kind in ("fixed_large", "learned", "learned_range")}
TABLES["unclipped"] = Schedule(clip_sample=False, variance_type="learned_range").table()
TABLES["x_0"] = Schedule(clip_sample=False).table(with_x_0=True)
SHAPES = [(1, 1, 1, 1), (2, 3, 16, 16), (3, 5, 7, 11), (2, 3, 700)]  # one block of the kernel is 1024 elements


def inputs(shape, table, *, guidance=False, known=False, dtype=torch.float32, halves=None):
    """x, the model's output and the options of a step."""
    n, channels, *spatial = shape
    halves = halves or 1 + (table.learned is not None)
    x, _ = step_inputs(shape)
    m = torch.randn(n * (1 + guidance), channels * halves, *spatial, generator=generator(5))
    if table.learned == "learned":
        m[:, channels:] = m[:, channels:].abs() / 100
    options = {}
    if guidance:
        options["guidance"] = torch.tensor([2.0, 0.0, 7.5][:n])
    if known:
        options["known"] = layout.channels_last(torch.randn(shape, generator=generator(6)))
        options["mask"] = layout.channels_last(torch.rand(shape, generator=generator(7)) < 0.5)
    return x, layout.channels_last(m.to(dtype)), options


def specified(x, m, table, pos, address, *, guidance=None, guide_variance=False, known=None, mask=None):
    """The specification, one entry at a time."""
    n, channels = x.shape[:2]
    out = []
    for i, p in enumerate(pos.tolist()):
        row, t = table.rows[p], int(table.timesteps[p])
        z = noise.normal(address[i : i + 1], x.shape[1:], stream=noise.STEP, t=t)
        known_z = noise.normal(address[i : i + 1], x.shape[1:], stream=noise.KNOWN, t=t)
        both = m[i : i + 1].float()
        if guidance is not None:
            all_guided = guided(both, m[n + i : n + i + 1].float(), guidance[i])
            both = torch.cat([all_guided[:, :channels], (all_guided if guide_variance else both)[:, channels:]], 1)
        v = both[:, channels:]
        x_prev = update(x[i : i + 1], both[:, :channels], row, z, clip=table.clip, v=v, learned=table.learned)
        if known is not None:
            x_prev = replaced(x_prev, known[i : i + 1], mask[i : i + 1], row, known_z)
        out.append(x_prev)
    return torch.cat(out)


def run(device, x, m, table, pos, address, **options):
    options = {key: value.to(device) if torch.is_tensor(value) else value for key, value in options.items()}
    x = x.to(device, copy=True)
    ops.conditional_step(x, m.to(device), table.to(device), pos.to(device), address.to(device), **options)
    return x


@pytest.mark.parametrize("known", [False, True], ids=["", "known"])
@pytest.mark.parametrize("guidance", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("kind", ["fixed_large", "learned", "learned_range", "unclipped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_equals_specification(shape, kind, guidance, known, device):
    table, pos, address = TABLES[kind], positions(*POSITIONS[: shape[0]]), addresses(shape[0])
    x, m, options = inputs(shape, table, guidance=guidance, known=known)
    want = specified(x, m, table, pos, address, **options)
    assert_same_bits(run(device, x, m, table, pos, address, **options), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_output_is_widened_first(dtype, device):
    table, pos, address = TABLES["learned_range"], positions(700, 1), addresses(2)
    x, m, options = inputs((2, 3, 8, 9), table, guidance=True, known=True, dtype=dtype)
    want = specified(x, m, table, pos, address, **options)
    assert_same_bits(run(device, x, m, table, pos, address, **options), want)


def test_variance_may_be_guided_too(device):
    table, pos, address = TABLES["learned_range"], positions(700, 1), addresses(2)
    x, m, options = inputs((2, 3, 8, 8), table, guidance=True)
    want = specified(x, m, table, pos, address, guide_variance=True, **options)
    assert not same_bits(want, specified(x, m, table, pos, address, **options))
    assert_same_bits(run(device, x, m, table, pos, address, guide_variance=True, **options), want)


def test_ddim_ignores_the_second_half(device):
    table = Schedule(variance_type="learned_range").table(sampler="ddim", eta=0.5)
    plain = replace(Schedule(), clip_sample=True).table(sampler="ddim", eta=0.5)
    x, m, options = inputs((2, 3, 8, 8), table, guidance=True, halves=2)
    pos, address = positions(700, 1), addresses(2)
    want = specified(x, m[:, :3], plain, pos, address, **options)
    assert_same_bits(run(device, x, m, table, pos, address, **options), want)


def test_known_part_is_exact_after_the_last_step(device):
    table, pos, address = TABLES["fixed_large"], positions(0, 0), addresses(2)
    x, m, options = inputs((2, 3, 8, 8), table, known=True)
    got = run(device, x, m, table, pos, address, **options).cpu()
    assert torch.equal(got[options["mask"]], options["known"][options["mask"]])


def test_given_x_0_replaces_the_predicted_one(device):
    table, pos, address = TABLES["x_0"], positions(700, 1), addresses(2)
    x, m, options = inputs((2, 3, 8, 8), table, guidance=True, known=True)
    x_0, _ = step_inputs((2, 3, 8, 8), seed=9)
    z = noise.normal(address, x.shape[1:], stream=noise.STEP, t=table.timesteps[pos.long()])
    known_z = noise.normal(address, x.shape[1:], stream=noise.KNOWN, t=table.timesteps[pos.long()])
    m_guided = guided(m[:2], m[2:], options["guidance"].view(2, 1, 1, 1))
    want = update(x, m_guided, table.rows[pos.long()], z, clip=True, x_0=x_0)
    want = replaced(want, options["known"], options["mask"], table.rows[pos.long()], known_z)
    assert_same_bits(run(device, x, m, table, pos, address, x_0=x_0, **options), want)


def test_guidance_of_1_is_the_conditional_step_within_rounding(device):
    table, pos, address = TABLES["fixed_large"], positions(700, 500), addresses(2)
    x, m, _ = inputs((2, 3, 8, 8), table, guidance=True)
    got = run(device, x, m, table, pos, address, guidance=torch.ones(2)).cpu()
    want = specified(x, m[:2], table, pos, address)
    assert (got - want).abs().max() <= 1e-6


@numpy_warns
@pytest.mark.parametrize("where", [(0, 1, 2, 3), (1, 2, 0, 0)])
def test_bad_values_are_flagged(where, device):
    table, pos, address = TABLES["learned_range"], positions(700, 1), addresses(2)
    x, m, options = inputs((2, 3, 8, 8), table)
    m[(where[0], where[1] + 3, *where[2:])] = nan if where[0] else inf
    bad = torch.full((2,), -1, dtype=torch.int32)
    flags = bad.to(device)
    got = run(device, x, m, table, pos, address, bad=flags, **options)
    assert not got[where].isfinite()
    assert flags.tolist() == [int(pos[n]) if n == where[0] else -1 for n in range(2)]


def test_exponential_is_within_a_unit():
    a = torch.linspace(-87, 88.7, 400_001)
    want = a.double().exp()
    assert ((exponential(a).double() - want).abs() / 2 ** (want.log2().floor() - 23)).max() <= 1
    special = exponential(torch.tensor([nan, inf, -inf, 0.0, 89.0, -200.0]))
    assert special[0].isnan()
    assert special[1:].tolist() == [inf, 0.0, 1.0, inf, 0.0]
    subnormal = torch.linspace(-103, -88, 10_001)
    assert ((exponential(subnormal).double() - subnormal.double().exp()).abs() <= 2.0**-149).all()


@numpy_warns
@pytest.mark.parametrize("v", [0.0, 1e3, -1e3, 1e30, -1e30, 88.6, -95.0])
def test_extreme_variances_are_those_of_the_specification(v, device):
    """Overflow, and deviations that are subnormal or zero."""
    table, pos, address = TABLES["learned_range"], positions(700), addresses(1)
    table = replace(table, rows=table.rows.clone())
    table.columns.L.fill_(0)
    table.columns.V.fill_(1)
    x, m, _ = inputs((1, 3, 8, 8), table)
    m[:, 3:] = v
    want = specified(x, m, table, pos, address)
    got = run(device, x, m, table, pos, address).cpu()
    assert torch.equal(got.isnan(), want.isnan())
    assert same_bits(got.nan_to_num(), want.nan_to_num())


def test_learned_range_lies_between_its_bounds():
    """Nichol and Dhariwal 2021, eq. 15: v = -1 gives the posterior's variance, v = 1 gives beta_t."""
    columns, (s, v) = TABLES["learned_range"].columns, (Schedule(), torch.ones(1000))
    posterior = (1 - s.alphas_cumprod_prev) / (1 - s.alphas_cumprod) * s.betas
    for sign, want in ((-1, posterior), (1, s.betas)):
        sigma = deviation(sign * v, columns.L, columns.V, "learned_range")[1:]
        torch.testing.assert_close(sigma.double(), want[1:].sqrt(), rtol=1e-6, atol=0)


MISTAKES = [
    ({"guidance": torch.ones(2)}, r"m is \(2, 6, 8, 8\).*; want \(4, 6, 8, 8\) on cpu"),
    ({"m": torch.zeros(2, 3, 8, 8)}, r"m is \(2, 3, 8, 8\).*; want \(2, 6, 8, 8\) on cpu"),
    ({"mask": torch.zeros(2, 3, 8, 8, dtype=torch.bool)}, "known is missing; give both"),
    ({"known": torch.zeros(2, 3, 8, 8)}, "mask is missing; give both"),
    ({"known": torch.zeros(2, 3, 8, 8), "mask": torch.zeros(2, 3, 8, 8)}, "mask is .*; want .* of bool"),
    ({"known": torch.zeros(2, 3, 8, 4), "mask": torch.zeros(2, 3, 8, 8, dtype=torch.bool)}, r"known is .*want \(2, 3"),
    ({"guidance": torch.ones(1), "m": torch.zeros(4, 6, 8, 8)}, r"guidance is \(1,\).*; want \(2,\)"),
    ({"x_0": torch.zeros(2, 3, 8, 8), "table": TABLES["unclipped"]}, r"Schedule.table\(with_x_0=True\)"),
    ({"pos": positions(1000, 0)}, "pos is 1000; want 0 to 999"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_arguments(change, message):
    x, m, _ = inputs((2, 3, 8, 8), TABLES["learned_range"])
    given = {"x": x, "m": m, "table": TABLES["learned_range"], "pos": positions(7, 1), "address": addresses(2)} | change
    given = {key: layout.channels_last(v) if torch.is_tensor(v) and v.ndim == 4 else v for key, v in given.items()}
    with pytest.raises(ValueError, match=message) as caught:
        ops.conditional_step(**given)
    assert re.match("conditional_step: ", str(caught.value))
