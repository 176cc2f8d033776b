"""Every kind of condition that a call of a sampler may bring, with the options of the reference loop."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastddpm import Sampler, Schedule
from fastddpm.core import noise
from fastddpm.reference import conditional
from fastddpm.reference.diffusion import add_noise
from tests.support.draws import generator

__all__ = ["KINDS", "SAMPLES", "SCHEDULE", "SHAPE", "Kind", "N", "Net", "T", "draw", "expected", "randn", "sampler_of"]

N, SHAPE, T = 5, (2, 4, 3), 12
SCHEDULE = Schedule(num_train_timesteps=T, beta_end=0.3)
SAMPLES = [3, 0, 7, 1 << 40, 12]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


class Net(nn.Module):
    """A network without reductions, so that its result for a sample cannot depend on the others."""

    def __init__(self, channels=2, concat=0, halves=1):
        super().__init__()
        self.gain = nn.Parameter(randn(halves * channels, channels + concat, seed=9))

    def forward(self, x, t, y=None, extra=None):
        h = sum(self.gain[:, i].view(-1, *[1] * (x.ndim - 2)) * x[:, i : i + 1] for i in range(x.shape[1]))
        h = h + (t.view(-1, *[1] * (x.ndim - 1)) * 0.02).sin()
        if y is not None:
            h = h * (1 + y.view(-1, *[1] * (x.ndim - 1)))
        if extra is not None:
            h = h + extra["shift"][:, None, None, None] * extra["factor"]
        return h.sin()


class Indexed(Net):
    """Asks for the sample index, instead of a closure over tensors that cannot know who is in the batch."""

    def forward(self, x, t, sample_index):
        return super().forward(x, t, y=(sample_index % 7) / 7)


@dataclass
class Kind:
    """Options of a call for N samples, the network, and the options of the reference loop."""

    options: dict[str, Any]
    net: nn.Module
    reference: dict[str, Any]
    schedule: Schedule = SCHEDULE
    table: Any = None
    start: torch.Tensor | None = None
    model: Any = None  # as the reference calls it


def halved(x_0, t):
    return x_0.clamp(-0.5, 0.5) + 0.01 * t.view(-1, 1, 1, 1)


def x_T():
    return noise.normal(noise.address(6, SAMPLES), SHAPE, stream=noise.START, t=T)


def kinds():
    y, null, concat = randn(N, seed=1), torch.tensor(0.25), randn(N, 1, 4, 3, seed=2)
    extra = {"shift": randn(N, seed=3).double(), "factor": 0.5}
    known, mask = randn(N, *SHAPE, seed=4), randn(N, 1, 4, 3, seed=5) > 0
    init, start, scale = randn(N, *SHAPE, seed=6), randn(N, *SHAPE, seed=7), torch.tensor([2.0, 0.0, 1.0, 7.5, -1.0])
    net, learns = Net(), Schedule(num_train_timesteps=T, beta_end=0.3, variance_type="learned_range")
    wide, both = Net(concat=1), Net(halves=2)
    every = {"known": known, "mask": mask.expand(N, *SHAPE)}
    of_y = lambda net, y: lambda x, t: net(x, t, y=y)
    found = {
        "plain": Kind({}, net, {}),
        "model_kwargs": Kind({"model_kwargs": {"y": y}}, net, {}, model=of_y(net, y)),
        "nested kwargs": Kind(
            {"model_kwargs": {"extra": extra}},
            net,
            {},
            model=lambda x, t: net(x, t, extra={**extra, "shift": extra["shift"].float()}),
        ),
        "concat": Kind({"concat": concat}, wide, {}, model=lambda x, t: wide(torch.cat([x, concat], 1), t)),
        "guidance": Kind(
            {"model_kwargs": {"y": y}, "guidance_scale": scale, "uncond_kwargs": {"y": 0.25}},
            net,
            {"unconditional": of_y(net, null.expand(N)), "guidance": scale},
            model=of_y(net, y),
        ),
        "guided variance": Kind(
            {"model_kwargs": {"y": y}, "guidance_scale": 3, "uncond_kwargs": {"y": null}, "guide_variance": True},
            both,
            {"unconditional": of_y(both, null.expand(N)), "guidance": torch.full((N,), 3.0), "guide_variance": True},
            schedule=learns,
            model=of_y(both, y),
        ),
        "learned variance": Kind({}, both, {}, schedule=learns),
        "start": Kind({"start": start, "start_timestep": 7}, net, {}, table=SCHEDULE.table().last(8), start=start),
        "init": Kind(
            {"init": init, "strength": 0.5},
            net,
            {},
            table=SCHEDULE.table().last(6),
            start=add_noise(init, x_T(), SCHEDULE.noising_table()[5]),
        ),
        "known": Kind({"known": known, "mask": mask}, net, every),
        "resample": Kind({"known": known, "mask": mask, "resample": 3}, net, {**every, "resample": 3}),
        "x_0_fn": Kind({"x_0_fn": halved}, net, {"x_0_fn": halved}, table=SCHEDULE.table(with_x_0=True)),
        "sample_index": Kind(
            {}, Indexed(), {}, model=lambda x, t: found["sample_index"].net(x, t, torch.tensor(SAMPLES))
        ),
    }
    everything = {
        **{"model_kwargs": {"y": y}, "guidance_scale": 2.0, "uncond_kwargs": {"y": randn(N, seed=8)}},
        **{"concat": concat, "known": known, "mask": mask, "resample": 2, "x_0_fn": halved},
        **{"start": start, "start_timestep": 9},
    }
    full = Net(concat=1, halves=2)
    call = lambda y: lambda x, t: full(torch.cat([x, concat], 1), t, y=y)
    found["everything"] = Kind(
        everything,
        full,
        {
            **{"unconditional": call(randn(N, seed=8)), "guidance": torch.full((N,), 2.0), "x_0_fn": halved},
            **{**every, "resample": 2},
        },
        schedule=learns,
        table=learns.table(with_x_0=True).last(10),
        start=start,
        model=call(y),
    )
    return found


KINDS = kinds()


def expected(kind: Kind) -> torch.Tensor:
    table, address = kind.table or kind.schedule.table(), noise.address(6, SAMPLES)
    with torch.no_grad():
        return conditional.sample(
            kind.model or kind.net,
            x_T() if kind.start is None else kind.start,
            table.rows,
            table.scale,
            table.timesteps,
            lambda stream, t: noise.normal(address, SHAPE, stream=stream, t=t),
            clip=table.clip,
            learned=table.learned,
            **kind.reference,
        )


def draw(sampler, kind, places=range(N), **options):
    """Draw the samples at these places, each with what it is given."""
    places = list(places)

    def of(value):
        if isinstance(value, dict):
            return {name: of(inner) for name, inner in value.items()}
        return value[places] if isinstance(value, torch.Tensor) and len(value.shape) and len(value) == N else value

    given = {name: of(value) for name, value in kind.options.items()}
    return sampler.sample([SAMPLES[i] for i in places], seed=6, progress=False, **given, **options)


def sampler_of(kind, **options):
    return Sampler(kind.net, kind.schedule, shape=SHAPE, device="cpu", **options)
