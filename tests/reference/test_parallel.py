"""The specification of sampling parallel in time: the bits of a plain loop, and the law of the coupling."""

from math import sqrt
from statistics import NormalDist

import pytest
import torch
from scipy import stats

from fastddpm import Sampler, Schedule, checkpoints
from fastddpm.core import noise
from fastddpm.reference import parallel
from fastddpm.reference.diffusion import guided, update
from fastddpm.reference.parallel import Rows, accepted, sample
from fastddpm.reference.unet import UNet
from tests.support.check import TINY

WINDOW = 4


def step_of(table, address):
    def step(x, m, row):
        z = noise.normal(address, x.shape[1:], stream=noise.STEP, t=table.timesteps[row])
        return update(x, m, table.rows[row], z, clip=table.clip)

    return step


def loop(model, x, table, step, window):
    """One step after the other, in the layout of the window: the other slots are empty."""
    for row in reversed(range(len(table))):
        slots = torch.zeros(window, *x.shape[1:], dtype=torch.bfloat16)
        slots[row % window] = x[0].bfloat16()
        t = torch.zeros(window, dtype=torch.int64)
        t[row % window] = table.timesteps[row]
        m = model(slots, t)[row % window][None].float()
        x = step(x, m, torch.tensor([row]))
    return x


def tiny(**config):
    torch.manual_seed(0)
    net = UNet(**{**TINY, "in_channels": 1, "out_channels": 1, **config}).eval()
    with torch.no_grad():
        net.conv_out.weight.normal_(0, 0.03)
    return net


TABLES = {
    "ddpm": Schedule().table().last(20),
    "unclipped": Schedule(clip_sample=False).table().last(20),
    "strided": Schedule().table(100).last(12),
    "ddim": Schedule(clip_sample=False).table(sampler="ddim").last(20),
    "ddim with noise": Schedule().table(sampler="ddim", eta=1.0).last(20),
    "x_0": Schedule(prediction_type="sample").table().last(20),
    "v": Schedule(prediction_type="v_prediction", clip_sample=False).table().last(20),
    "first rows": Schedule(num_train_timesteps=12).table(),
    "three rows": Schedule().table().last(3),
}


@torch.no_grad()
@pytest.mark.parametrize("window", [1, WINDOW, 50])
@pytest.mark.parametrize("name", TABLES)
def test_rounds_have_the_bits_of_the_loop(name, window):
    if window != WINDOW and name not in ("ddpm", "three rows"):
        return
    table, address, net = TABLES[name], noise.address(3, [5]), tiny()
    model, step = lambda x, t: net(x.float(), t), step_of(TABLES[name], address)
    x = noise.normal(address, (1, 16, 16), stream=noise.START, t=table.num_train_timesteps)
    got, steps = sample(model, x, Rows(table.rows, table.scale), table.timesteps, step, window=window)
    assert torch.equal(got, loop(model, x, table, step, window))
    assert sum(steps) == len(table)
    assert max(steps) <= window
    assert len(steps) < len(table) or window == 1 or name not in ("ddpm", "unclipped", "ddim")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["labels", "guidance", "model_kwargs"])
def test_conditional_networks_have_the_bits_of_the_loop(kind):
    table, address, net = TABLES["ddpm"], noise.address(3, [5]), tiny(num_class_embeds=3)
    labels = lambda x, label: torch.full((len(x),), label)
    model = {
        "labels": lambda x, t: net(x.float(), t, labels(x, 2)),
        "guidance": lambda x, t: guided(
            net(x.float(), t, labels(x, 2)), net(x.float(), t, labels(x, 0)), torch.tensor(3.0)
        ),
        "model_kwargs": lambda x, t: net(x.float(), t, labels(x, 1)) + 0.1 * x.float().mean((1, 2, 3), keepdim=True),
    }[kind]
    step = step_of(table, address)
    x = noise.normal(address, (1, 16, 16), stream=noise.START, t=1000)
    got, steps = sample(model, x, Rows(table.rows, table.scale), table.timesteps, step, window=WINDOW)
    assert torch.equal(got, loop(model, x, table, step, WINDOW))
    assert len(steps) < len(table)


@torch.no_grad()
def test_bundled_model_has_the_bits_of_the_loop():
    checkpoint = checkpoints.load(checkpoints.shipped_model())
    net = UNet(**checkpoint.config).eval()
    net.load_state_dict(checkpoint.parameters)
    table, address = checkpoint.schedule.table().last(24), noise.address(0, [0])
    start = Sampler.from_pretrained(precision="fp32").sample(1, steps=20, progress=False)
    x = start + 0.05 * noise.normal(address, start.shape[1:], stream=noise.START, t=1000)
    model, step = lambda x, t: net(x.float(), t), step_of(table, address)
    got, steps = sample(model, x, Rows(table.rows, table.scale), table.timesteps, step, window=8)
    assert torch.equal(got, loop(model, x, table, step, 8))
    assert len(steps) < len(table)


@pytest.mark.parametrize("gap", [0.0, 0.1, 1.0, 3.0])
def test_coupling_keeps_the_distribution(gap):
    """The result is N(mean, S^2) for any mean of the draft, which is accepted with the highest possible probability."""
    table, G, dim, row = Schedule(clip_sample=False).table(), 20_000, 3, 500
    address = noise.address(1, G)
    generator = torch.Generator().manual_seed(0)
    x, m = (torch.randn(G, dim, generator=generator) for _ in range(2))
    pos = torch.full((G,), row)
    mean = update(x, m, table.rows[row], None, clip=False)
    S = table.rows[row, 7]
    direction = torch.nn.functional.normalize(torch.randn(G, dim, generator=generator), dim=1)
    z = noise.normal(address, (dim,), stream=noise.STEP, t=int(table.timesteps[row]))
    states = torch.full((G, 2, dim), torch.nan)
    states[:, (row - 1) % 2] = mean + S * (gap * direction + z)
    outputs = m[:, None].repeat(1, 2, 1)
    result, reached = accepted(
        *(x, states.nan_to_num(), outputs, pos, Rows(table.rows, table.scale)),
        z=lambda rows: noise.normal(parallel.repeated(address, 2), (dim,), stream=noise.STEP, t=table.timesteps[rows]),
        log_u=lambda rows: noise.uniform(
            parallel.repeated(address, 2), stream=noise.COUPLING, t=table.timesteps[rows].long()
        ).log(),
        clip=False,
        ahead=2,
    )
    white = ((result - mean) / S).double()
    then = update(
        states[:, (row - 1) % 2],
        *(m, table.rows[row - 1], noise.normal(address, (dim,), stream=noise.STEP, t=int(table.timesteps[row - 1]))),
        clip=False,
    )
    assert torch.equal(result[reached == row - 2], then[reached == row - 2])  # accepted drafts, and a plain step
    first = reached == row - 1  # a reflected step ends the round; an accepted one is followed by the plain last row
    accepted_share = 1 - float(first.double().mean())
    expected = 2 * NormalDist().cdf(-gap / 2)
    assert abs(accepted_share - expected) <= 5 * sqrt(expected * (1 - expected) / G) + 1e-3 * (gap == 0)
    drafted = ((states[:, (row - 1) % 2] - mean) / S).double()
    white = torch.where(first[:, None], white, drafted)  # x_{t-1}, before the plain step of the row after it
    along = (white * direction).sum(1)
    across = white[:, 0] - along * direction[:, 0]
    across = across / (1 - direction[:, 0].double() ** 2).sqrt()
    for values in (along, across):
        assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    assert stats.kstest((white**2).sum(1).numpy(), "chi2", (dim,)).pvalue > 1e-3


def test_a_coupling_without_reflection_is_detected():
    """The Kolmogorov-Smirnov test detects a coupling that replaces a refused draft by p + S z."""
    generator = torch.Generator().manual_seed(0)
    z, u = torch.randn(20_000, generator=generator), torch.rand(20_000, generator=generator)
    takes = u.log() <= z - 0.5  # a gap of 1
    assert stats.kstest(torch.where(takes, z + 1, z).numpy(), "norm").pvalue < 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_draft_that_is_not_usable_is_replaced_by_the_plain_step(bad):
    table, row, address = Schedule(clip_sample=False).table(), 500, noise.address(1, 2)
    x, m = torch.ones(2, 3), torch.ones(2, 2, 3)
    pos, states = torch.full((2,), row), torch.full((2, 2, 3), bad)
    of_two = parallel.repeated(address, 2)
    result, reached = accepted(
        *(x, states, m, pos, Rows(table.rows, table.scale)),
        z=lambda rows: noise.normal(of_two, (3,), stream=noise.STEP, t=table.timesteps[rows]),
        log_u=lambda rows: torch.full((4,), -1e-3),
        clip=False,
        ahead=2,
    )
    assert reached.tolist() == [row - 1] * 2
    assert torch.equal(result, step_of(table, address)(x, m[:, 0], pos))


def test_uniform_numbers_are_uniform_and_independent_of_the_noise():
    address = noise.address(7, 20_000)
    u = noise.uniform(address, stream=noise.COUPLING, t=torch.full((20_000,), 3))
    assert u.min() > 0
    assert u.max() <= 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    z = noise.normal(address, (1,), stream=noise.STEP, t=3)[:, 0]
    assert abs(float(torch.corrcoef(torch.stack([u, z]))[0, 1])) < 5 / sqrt(20_000)
    words = noise.philox(*(torch.tensor([v]) for v in (0, 3, 4, noise.COUPLING << 24, 7, 0)))
    assert float(noise.uniform(address[4:5], stream=noise.COUPLING, t=torch.tensor([3]))) == pytest.approx(
        (float(words[0]) + 0.5) / 2**32, rel=1e-7
    )
