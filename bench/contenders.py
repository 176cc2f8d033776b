"""Implementations of the same work with the same weights: fastddpm, its reference, and diffusers.

A contender is named "who engine precision":

- "fastddpm ...": any `engine` and `precision` of `Sampler`;
- "reference eager fp32": fastddpm/reference, plain torch that can be read in one sitting;
- "diffusers eager fp32": diffusers with its defaults;
- "diffusers eager bf16": what its documentation recommends first, bf16 and channels-last;
- "diffusers compiled bf16": all that it recommends, including torch.compile with max-autotune;
- "diffusers compiled+frozen fp32": torch.compile with the weights as constants, for a CPU;
- "onnxruntime exported fp32", "openvino exported bf16": diffusers' network in these runtimes, see bench/exported.py.
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

from bench import exported
from bench.layouts import network
from bench.machine import DEVICE, Call, judged, wait
from fastddpm import Schedule
from fastddpm.core import noise
from fastddpm.core.precision import PRECISIONS, Compute, arithmetic, has_native_bf16
from fastddpm.reference.diffusion import Diffusion, linear_betas, update
from fastddpm.reference.unet import UNet
from fastddpm.sampling.arguments import sample_shape
from fastddpm.sampling.engine import Engine
from fastddpm.sampling.loop import reverse_process
from fastddpm.sampling.runner import Runner

T, MIDDLE = 1000, 500  # number of timesteps; the timestep at which a network is judged
SCHEDULE = Schedule()


class Contender(NamedTuple):
    who: str
    engine: str
    precision: str

    @property
    def ceiling(self) -> str:
        """The precision of its matrix products. diffusers leaves TF32 in cuDNN on, as torch does."""
        return "tf32" if self.who == "diffusers" and self.precision == "fp32" else self.precision


class Prepared(NamedTuple):
    """A contender that is ready to run and has passed the gate.

    Attributes:
        run: does the work.
        seconds: from a float32 network on the device to the end of the first call: converting weights, compiling, and
            capturing a graph.
        errors: those that the gate measured.
    """

    run: Call
    seconds: float
    errors: dict[str, Any]


def contender(name: str) -> Contender:
    found = Contender(*name.split())
    if "compiled" in found.engine:
        torch.compiler.reset()  # discard what other cases compiled
    if found.who == "diffusers" and not find_spec("diffusers"):
        pytest.skip("diffusers is not installed")
    if found.engine == "exported" and (missing := exported.missing_package(found.who) or not find_spec("diffusers")):
        pytest.skip(f"{missing if isinstance(missing, str) else 'diffusers'} is not installed")
    if found.precision == "bf16" and found.engine == "exported" and not has_native_bf16(DEVICE):
        pytest.skip("this CPU has no bf16")
    return found


# A forward pass


@contextmanager
def forward(model: str, batch: int, who: Contender) -> Iterator[Prepared]:
    """Yield a forward pass of the network alone, for a batch at t = 500. The caller may capture it in a graph."""
    net, began = _network_of(who, model), time.perf_counter()
    if who.who == "fastddpm":
        uncaptured = who.engine.replace("compiled+graph", "compiled").replace("graph", "eager")
        with runner_of(model, batch, who._replace(engine=uncaptured)) as runner:
            at_the_middle(runner, model)
            yield _ready(runner.predict, began, model, who)
        return
    if who.engine == "exported":
        x, predict = inputs(model, batch).contiguous().numpy(), _exported(net, model, batch, who)
        yield _ready(lambda: torch.from_numpy(predict(x, MIDDLE)), began, model, who)
        return
    x, t = inputs(model, batch).to(PRECISIONS[who.precision]), torch.full((batch,), MIDDLE, device=DEVICE)
    if who.who == "reference":

        def run() -> Tensor:
            with torch.no_grad(), arithmetic("fp32", DEVICE):
                return net(x, t)
    else:
        unet = _made_fast(net, who)

        def run() -> Tensor:
            with torch.no_grad():
                return unet(x, t, return_dict=False)[0]

    yield _ready(run, began, model, who)


# All steps


@contextmanager
def loop(model: str, batch: int, steps: int, who: Contender) -> Iterator[Prepared]:
    """Yield a run of `steps` of the T steps, from x_T to images on the host."""
    net, began = _network_of(who, model), time.perf_counter()
    if who.who == "fastddpm":
        with runner_of(model, batch, who) as runner:
            yield _loop_of_runner(runner, model, steps, who, began)
    elif who.who == "reference":
        with arithmetic("fp32", DEVICE):
            yield _loop_of_the_reference(net, model, batch, steps, who, began)
    elif who.engine == "exported":
        shape, predict = (batch, *sample_shape(network(model))), _exported(net, model, batch, who)
        x = inputs(model, batch).contiguous().numpy()
        first = _ready(lambda: torch.from_numpy(predict(x, MIDDLE)), began, model, who)
        yield first._replace(run=lambda: torch.from_numpy(exported.sample(predict, shape, steps, T)))
    else:
        yield _loop_of_diffusers(net, model, batch, steps, who, began)


def _loop_of_runner(runner: Runner, model: str, steps: int, who: Contender, began: float) -> Prepared:
    table, address = SCHEDULE.table(steps), noise.address(0, len(runner.x))
    runner.load(table, address)
    next(reverse_process(runner))
    wait()
    seconds = time.perf_counter() - began
    errors = judge_a_step(runner, model, who)

    def run() -> Tensor:
        runner.load(table, address)
        for _ in reverse_process(runner):
            pass
        return runner.x.cpu()

    return Prepared(run, seconds, errors)


def _loop_of_the_reference(net: UNet, model: str, batch: int, steps: int, who: Contender, began: float) -> Prepared:
    """Run the last steps of the schedule, with noise from torch's generator."""
    diffusion, shape = Diffusion(linear_betas(T)), sample_shape(network(model))

    @torch.no_grad()
    def run() -> Tensor:
        x = torch.randn(batch, *shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
        for t in reversed(range(steps)):
            z = torch.randn_like(x) if t else None
            x = diffusion.step(x, net(x, torch.full((batch,), t, device=DEVICE)), t, z, clip=1)
        return x.cpu()

    with torch.no_grad():
        first = partial(net, inputs(model, batch), torch.full((batch,), MIDDLE, device=DEVICE))
        return _ready(first, began, model, who)._replace(run=run)


def _loop_of_diffusers(net: Any, model: str, batch: int, steps: int, who: Contender, began: float) -> Prepared:
    from diffusers import DDPMPipeline, DDPMScheduler

    pipeline = DDPMPipeline(net, DDPMScheduler())
    pipeline.unet = _made_fast(net, who)
    pipeline.set_progress_bar_config(disable=True)

    def run(steps: int = steps) -> Tensor:
        return pipeline(batch_size=batch, num_inference_steps=steps, output_type="pt").images.cpu()

    run(3 if "compiled" in who.engine else 1)  # the warm-up, the capture and a replay of its graphs
    seconds = time.perf_counter() - began
    x = inputs(model, batch).to(PRECISIONS[who.precision])
    with torch.no_grad():  # as in the pipeline, otherwise it would be compiled again
        result = pipeline.unet(x.contiguous(), torch.tensor(MIDDLE), return_dict=False)[0]
    return Prepared(run, seconds, judge(result, model, who))


def _network_of(who: Contender, model: str) -> Any:
    """Return the network in float32 on the device, as it is before its first use."""
    if who.who == "fastddpm":
        return network(model)
    if who.who == "reference":
        return reference(model)
    return theirs(model)


def theirs(model: str) -> Any:
    """Return diffusers' network, in float32 on the device."""
    from diffusers import UNet2DModel

    unet = UNet2DModel(**network(model).config).eval()
    unet.load_state_dict(network(model).state_dict())
    return unet.to(DEVICE)


def _exported(unet: Any, model: str, batch: int, who: Contender) -> exported.Predict:
    return exported.predictor(who.who, unet, (batch, *sample_shape(network(model))), who.precision)


def _made_fast(unet: Any, who: Contender) -> Any:
    if who.precision == "bf16":
        unet.to(torch.bfloat16).to(memory_format=torch.channels_last)
    if who.engine == "compiled+frozen":
        return torch.compile(unet.requires_grad_(False), fullgraph=True, options={"freezing": True})
    if who.engine == "compiled":
        mode = "max-autotune" if DEVICE.type == "cuda" else "default"
        return torch.compile(unet, mode=mode, fullgraph=True)
    return unet


# fastddpm's engine


@contextmanager
def runner_of(model: str, batch: int, who: Contender) -> Iterator[Runner]:
    net = network(model)
    engine = Engine(net, sample_shape(net), T, Compute.resolve(DEVICE, who.precision), who.engine)
    with engine.runner(batch, capture=engine.captures(T)) as runner:
        yield runner


def at_the_middle(runner: Runner, model: str) -> None:
    """Prepare one step from t = 500 to x_0, from the inputs that are judged."""
    runner.load(Schedule(clip_sample=False).table(timesteps=[MIDDLE]), noise.address(0, len(runner.x)))
    runner.start()
    runner.x.copy_(inputs(model, len(runner.x)))
    runner.network.input.copy_(runner.x)


def judge_a_step(runner: Runner, model: str, who: Contender) -> dict[str, Any]:
    """Like `judge`, for a whole step."""
    at_the_middle(runner, model)
    runner.step()
    row = Schedule(clip_sample=False).table(timesteps=[MIDDLE]).to(DEVICE).rows[0]
    x, (plain, ref) = inputs(model, 1), expected(model, who.ceiling)
    theirs, want = update(x, plain, row, None, clip=False), update(x.double(), ref, row, None, clip=False)
    return _judged_at_the_ends(runner.x, theirs, want)


# The gate


def _ready(run: Callable[[], Tensor], began: float, model: str, who: Contender) -> Prepared:
    result = run()
    wait()
    return Prepared(run, time.perf_counter() - began, judge(result, model, who))


def judge(result: Tensor, model: str, who: Contender) -> dict[str, Any]:
    """Return the errors of a network, which are at most twice those of plain torch in the same precision.

    Raises: AssertionError: they are larger; a wrong network is not timed.
    """
    return _judged_at_the_ends(result, *expected(model, who.ceiling))


def _judged_at_the_ends(result: Tensor, plain: Tensor, ref: Tensor) -> dict[str, Any]:
    return judged(result[[0, -1]], plain.expand(2, *plain.shape[1:]), ref.expand(2, *ref.shape[1:]))


def inputs(model: str, batch: int) -> Tensor:
    """Return [batch, C, H, W] float32, exact in all precisions. The first and last sample are equal, and are judged."""
    x = noise.normal(noise.address(0, batch), sample_shape(network(model)), stream=noise.STEP, t=MIDDLE)
    x[-1] = x[0]
    return x.bfloat16().float().to(DEVICE)


@cache
@torch.no_grad()
def expected(model: str, precision: str) -> tuple[Tensor, Tensor]:
    """Return what plain torch computes from the input that is judged, in that precision and in float64."""
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
