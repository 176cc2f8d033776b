"""The drop-in next to diffusers' own classes: the host time of a step, and whole pipelines.

pytest bench/test_diffusers.py
"""

import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.contenders import T
from bench.layouts import flops, network
from bench.machine import DEVICE, SCALE, judged, say, wait
from fastddpm.core.precision import PRECISIONS
from fastddpm.reference.diffusion import Diffusion, linear_betas
from fastddpm.sampling.arguments import sample_shape

WHO = ("fastddpm", "diffusers")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
PLACES = ("cpu", "cuda") if DEVICE.type == "cuda" else ("cpu",)  # of the timesteps
BATCHES = {"cuda": (1, 64), "cpu": (1, 64), "tiny": (2,)}[SCALE]
VISITED = 100  # steps of a round
RUNS = {  # model, batch: steps of a run
    "cuda": {("cifar10-32", 1): 100, ("cifar10-32", 64): 50, ("shipped", 1): 100, ("shipped", 64): 50},
    "cpu": {("shipped", 1): 100, ("shipped", 64): 20, ("cifar10-32", 1): 40},
    "tiny": {("cifar10-32", 2): 3},
}[SCALE]


@pytest.fixture(scope="module")
def times():
    """{case: {who: seconds}}, printed side by side at the end."""
    cases: dict[str, dict[str, float]] = {}
    yield cases
    say(f"\n{'':<64}{'fastddpm, us':>14}{'diffusers, us':>15}{'times':>8}")
    for case, found in cases.items():
        if len(found) == len(WHO):
            ours, theirs = (1e6 * found[who] for who in WHO)
            say(f"{case:<64}{ours:>14.1f}{theirs:>15.1f}{theirs / ours:>8.2f}")


@pytest.mark.benchmark(timer=time.perf_counter)  # host time: does not wait for the GPU
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_step(measure, times, name, batch, place, who):
    """Host time of `scheduler.step`; on a GPU also its kernel launches and its waits for them."""
    scheduler = made(who, name)
    scheduler.set_timesteps(T, device=place)
    x, m = (torch.randn(batch, 3, 32, 32, device=DEVICE) for _ in range(2))
    visited = list(scheduler.timesteps[500 : 500 + VISITED])

    def run() -> None:
        for t in visited:
            scheduler.step(m, t, x)

    errors = judged(*one_step(name, scheduler, visited[0], x, m))
    facts = launches_and_waits(run) if DEVICE.type == "cuda" else {}
    case = f"{name}.step, batch {batch}, timesteps on {place}"
    seconds = measure(run, VISITED, group=case, contender=f"{who} eager fp32", errors=errors, facts=facts)
    times.setdefault(case, {})[who] = seconds


def one_step(name: str, scheduler: Any, t: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_{t-1} with the same noise: of a scheduler, of diffusers' own, and of the textbook in float64."""
    theirs = made("diffusers", name)
    theirs.set_timesteps(T)
    results = []
    for each in (scheduler, theirs):
        generator = torch.Generator().manual_seed(0)
        results.append(each.step(m, t.to(each.timesteps.device), x, generator=generator).prev_sample)
    diffusion, at = Diffusion(linear_betas(T)), int(t)
    eps = m.double()
    if name == "DDPMScheduler":
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        return results[0], results[1], diffusion.step(x.double(), eps, at, z.double(), clip=1)
    abar = diffusion.alphas_cumprod[at - 1]
    x_0 = diffusion.predicted_x_0(x.double(), at, eps).clamp(-1, 1)
    return results[0], results[1], abar.sqrt() * x_0 + (1 - abar).sqrt() * eps  # arXiv:2010.02502, eq. 12


def launches_and_waits(run: Callable[[], None]) -> dict[str, float]:
    """Count the kernels and copies that a step launches, and its waits for the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        wait()
    launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waited = sum("synchronizing" in str(warning.message) for warning in waits)
    return {"launches": launches / VISITED, "waits": waited / VISITED}


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("model", "batch"), RUNS)
def test_pipeline(measure, times, model, batch, precision, who):
    """`DDPMPipeline`, from the noise of a generator to images on the device."""
    steps = RUNS[model, batch]
    pipeline = pipeline_of(who, model, precision)
    errors = judged(*first_images(pipeline, model, batch, precision))

    def run() -> Tensor:
        return images_of(pipeline, batch, steps)

    case = f"DDPMPipeline, {model}, batch {batch}, {precision}"
    seconds = measure(
        run,
        steps,
        group=case,
        contender=f"{who} pipeline {precision}",
        flops=batch * flops(model),
        images=batch / T,
        precision="tf32" if precision == "fp32" and DEVICE.type == "cuda" else precision,
        errors=errors,
        facts={"steps": steps},
    )
    times.setdefault(case, {})[who] = seconds


def first_images(pipeline: Any, model: str, batch: int, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images of a single step, at t = 0: of a pipeline, of diffusers' own, and in float64."""
    theirs = pipeline_of("diffusers", model, precision)
    ours, plain = images_of(pipeline, batch, 1), images_of(theirs, batch, 1)
    shape = (batch, *sample_shape(network(model)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=PRECISIONS[precision]).to(DEVICE).double()
    exact = pipeline_of("diffusers", model, "fp32").unet.double()
    with torch.no_grad():
        x_0 = Diffusion(linear_betas(T)).predicted_x_0(x, 0, exact(x, 0).sample)
    return ours, plain, (x_0.clamp(-1, 1) / 2 + 0.5)


def images_of(pipeline: Any, batch: int, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch, generator, num_inference_steps=steps, output_type="pt").images


def pipeline_of(who: str, model: str, precision: str) -> Any:
    unet = made("diffusers", "UNet2DModel", **network(model).config).eval()
    unet.load_state_dict(network(model).state_dict())
    pipeline = made(who, "DDPMPipeline", unet.to(DEVICE, PRECISIONS[precision]), made(who, "DDPMScheduler"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made(who: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Return an object of diffusers' class of that name, or of ours."""
    pytest.importorskip("diffusers").logging.set_verbosity_error()  # warns when a network is cast
    module = importlib.import_module("diffusers" if who == "diffusers" else "fastddpm.diffusers")
    return getattr(module, name)(*args, **kwargs)
