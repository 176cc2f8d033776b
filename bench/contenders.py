"""Who does the same work: fastddpm, its reference, and diffusers, with the same weights.

A contender is named "who engine precision":

- "fastddpm ...": each `engine` and `precision` of `Sampler`;
- "reference eager fp32": fastddpm/reference, plain torch that can be read in one sitting;
- "diffusers eager fp32": diffusers as it comes;
- "diffusers eager bf16": what its documentation tells to do first, bf16 and channels-last;
- "diffusers compiled bf16": all that it tells, torch.compile with max-autotune and fused projections besides.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.layouts import network
from bench.machine import DEVICE, Call, judged, wait
from fastddpm import Schedule, noise
from fastddpm.engine import PRECISIONS, Engine, Slots, arithmetic
from fastddpm.reference.diffusion import Diffusion, linear_betas, update
from fastddpm.reference.unet import UNet
from fastddpm.sampler import sample_shape

T, MIDDLE = 1000, 500  # steps of the schedule; where a network is judged
SCHEDULE = Schedule()


class Contender(NamedTuple):
    who: str
    engine: str
    precision: str

    @property
    def ceiling(self) -> str:
        """The precision whose matrix products are its limit: diffusers leaves TF32 to cuDNN as torch does, on."""
        return "tf32" if self.who == "diffusers" and self.precision == "fp32" else self.precision


class Prepared(NamedTuple):
    """A contender that has been made ready, and judged.

    Attributes:
        run: does the work.
        seconds: from the network's making to the end of the first call: weights converted, code compiled, a graph
            captured.
        errors: what the gate found.
    """

    run: Call
    seconds: float
    errors: dict[str, Any]


def contender(name: str) -> Contender:
    found = Contender(*name.split())
    if "compiled" in found.engine:
        torch.compiler.reset()  # what another case has compiled
    if found.who == "diffusers" and not find_spec("diffusers"):
        pytest.skip("diffusers is not installed")
    return found


# A forward pass


@contextmanager
def forward(model: str, batch: int, who: Contender) -> Iterator[Prepared]:
    """A pass of the network alone, over a batch at t = 500; what captures it is who times it."""
    began = time.perf_counter()
    if who.who == "fastddpm":
        uncaptured = who.engine.replace("compiled+graph", "compiled").replace("graph", "eager")
        with slots_of(model, batch, who._replace(engine=uncaptured)) as slots:
            at_the_middle(slots, model)
            yield _ready(slots.predict, began, model, who.precision)
        return
    x = inputs(model, batch).to(PRECISIONS[who.precision])
    t = torch.full((batch,), MIDDLE, device=DEVICE)
    if who.who == "reference":
        net = reference(model)

        def run() -> Tensor:
            with torch.no_grad(), arithmetic("fp32", DEVICE):
                return net(x, t)
    else:
        unet = _diffusers_unet(model, who)
        x = x.to(memory_format=torch.channels_last if who.precision == "bf16" else torch.contiguous_format)

        def run() -> Tensor:
            with torch.no_grad():
                return unet(x, t, return_dict=False)[0]

    yield _ready(run, began, model, who.precision)


# All steps


@contextmanager
def loop(model: str, batch: int, steps: int, who: Contender) -> Iterator[Prepared]:
    """So many of the T steps, from x_T to images on the host."""
    began = time.perf_counter()
    if who.who == "fastddpm":
        with slots_of(model, batch, who) as slots:
            yield _loop_of_slots(slots, model, batch, steps, who, began)
    elif who.who == "reference":
        with arithmetic("fp32", DEVICE):
            yield _loop_of_the_reference(model, batch, steps, began)
    else:
        yield _loop_of_diffusers(model, batch, steps, who, began)


def _loop_of_slots(slots: Slots, model: str, batch: int, steps: int, who: Contender, began: float) -> Prepared:
    slots.load(SCHEDULE.table(), noise.address(0, batch))
    slots.advance()
    wait()
    seconds = time.perf_counter() - began
    errors = judge_a_step(slots, model, who.precision)
    table, address = SCHEDULE.table(steps), noise.address(0, batch)

    def run() -> Tensor:
        slots.load(table, address)
        for _ in range(steps):
            slots.advance()
        return slots.x.cpu()

    return Prepared(run, seconds, errors)


def _loop_of_the_reference(model: str, batch: int, steps: int, began: float) -> Prepared:
    """The last steps, with noise from torch's generator."""
    net, diffusion = reference(model), Diffusion(linear_betas(T))

    @torch.no_grad()
    def run() -> Tensor:
        x = torch.randn(batch, *sample_shape(network(model)), device=DEVICE)
        x = x.contiguous(memory_format=torch.channels_last)
        for t in reversed(range(steps)):
            z = torch.randn_like(x) if t else None
            x = diffusion.step(x, net(x, torch.full((batch,), t, device=DEVICE)), t, z, clip=1)
        return x.cpu()

    with torch.no_grad():
        ready = _ready(
            partial(net, inputs(model, batch), torch.full((batch,), MIDDLE, device=DEVICE)), began, model, "fp32"
        )
    return ready._replace(run=run)


def _loop_of_diffusers(model: str, batch: int, steps: int, who: Contender, began: float) -> Prepared:
    from diffusers import DDPMPipeline, DDPMScheduler

    pipeline = DDPMPipeline(_diffusers_unet(model, who._replace(engine="eager")), DDPMScheduler())
    pipeline.unet = unet = _diffusers_compiled(pipeline.unet) if who.engine == "compiled" else pipeline.unet
    pipeline.set_progress_bar_config(disable=True)

    def run(steps: int = steps) -> Tensor:
        return pipeline(batch_size=batch, num_inference_steps=steps, output_type="pt").images.cpu()

    run(3)  # compiles, and what a graph needs before its capture
    seconds = time.perf_counter() - began
    x, t = inputs(model, batch).to(PRECISIONS[who.precision]), torch.full((batch,), MIDDLE, device=DEVICE)
    with torch.no_grad():
        errors = judge(unet(x, t, return_dict=False)[0], model, who.precision)
    return Prepared(run, seconds, errors)


def _diffusers_unet(model: str, who: Contender) -> Any:
    from diffusers import UNet2DModel

    unet = UNet2DModel(**network(model).config).eval()
    unet.load_state_dict(network(model).state_dict())
    unet.to(DEVICE)
    if who.precision == "bf16":
        unet.to(torch.bfloat16).to(memory_format=torch.channels_last)
    return _diffusers_compiled(unet) if who.engine == "compiled" else unet


def _diffusers_compiled(unet: Any) -> Any:
    if hasattr(unet, "fuse_qkv_projections"):
        unet.fuse_qkv_projections()
    return torch.compile(unet, mode="max-autotune" if DEVICE.type == "cuda" else "default", fullgraph=True)


# fastddpm's engine


@contextmanager
def slots_of(model: str, batch: int, who: Contender) -> Iterator[Slots]:
    net = network(model)
    with Engine(net, sample_shape(net), T, DEVICE, who.precision, who.engine).slots(batch, T) as slots:
        yield slots


def at_the_middle(slots: Slots, model: str) -> None:
    """One step from t = 500 to x_0, from the inputs that are judged."""
    slots.load(Schedule(clip_sample=False).table(timesteps=[MIDDLE]), noise.address(0, len(slots.x)))
    slots.x.copy_(inputs(model, len(slots.x)))
    slots.low.copy_(slots.x)


def judge_a_step(slots: Slots, model: str, precision: str) -> dict[str, Any]:
    """As `judge`, of the whole step."""
    at_the_middle(slots, model)
    slots.advance()
    row = Schedule(clip_sample=False).table(timesteps=[MIDDLE]).to(DEVICE).rows[0]
    x, (plain, ref) = inputs(model, len(slots.x))[:1], expected(model, precision)
    theirs, want = update(x, plain, row, None, clip=False), update(x.double(), ref, row, None, clip=False)
    return judged(slots.x[:1], theirs, want)


# The gate


def _ready(run: Callable[[], Tensor], began: float, model: str, precision: str) -> Prepared:
    result = run()
    wait()
    return Prepared(run, time.perf_counter() - began, judge(result, model, precision))


def judge(result: Tensor, model: str, precision: str) -> dict[str, Any]:
    """No timing of a wrong network: of the first image it errs at most twice as much as plain torch in that precision.

    Raises: AssertionError: it does.
    """
    return judged(result[:1], *expected(model, precision))


def inputs(model: str, batch: int) -> Tensor:
    """[batch, C, H, W] float32 that every precision can represent; the first is the same in every batch."""
    x = noise.normal(noise.address(0, batch), sample_shape(network(model)), stream=noise.STEP, t=MIDDLE)
    return x.bfloat16().float().to(DEVICE)


@cache
@torch.no_grad()
def expected(model: str, precision: str) -> tuple[Tensor, Tensor]:
    """What plain torch makes of the first input in that precision, and in float64."""
    x, t = inputs(model, 1), torch.full((1,), MIDDLE, device=DEVICE)
    with arithmetic(precision, DEVICE):
        plain = reference(model).to(PRECISIONS[precision])(x.to(PRECISIONS[precision]), t)
    return plain, _exact(model)


@cache
@torch.no_grad()
def _exact(model: str) -> Tensor:
    return reference(model).double()(inputs(model, 1).double(), torch.full((1,), MIDDLE, device=DEVICE))


def reference(model: str) -> UNet:
    net = UNet(**network(model).config).to(DEVICE, memory_format=torch.channels_last).eval()
    net.load_state_dict(network(model).state_dict())
    return net
