"""Whole sampling next to diffusers' pipeline, same weights and batch: pytest bench/test_sampling.py -s

Runs take fewer than the 1000 steps where those would take long. Every step is the same work, so images/s are scaled to
1000. What is done once before the steps (weights converted, code compiled, a graph captured) is the column "prepare".
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from check import assert_as_accurate

from bench import kinds
from bench.layouts import flops, network
from bench.machine import DEVICE, SCALE, peak_bytes, say, wait
from fastddpm import Sampler, Schedule, UNet2D, checkpoint, layout, noise, ops
from fastddpm.engine import PRECISIONS, Engine, Slots, arithmetic
from fastddpm.reference.diffusion import update
from fastddpm.reference.unet import UNet
from fastddpm.sampler import sample_shape

T = 1000
SCHEDULE = Schedule()
STEPS = {  # of a run: seconds at most
    "cuda": {("cifar10-32", n): steps for n, steps in ((1, 1000), (64, 200), (16, 500), (256, 50), (512, 25))},
    "cpu": {("cifar10-32", 1): 20, ("cifar10-32", 16): 4, ("shipped", 1): 50, ("shipped", 16): 20},
    "tiny": {("cifar10-32", 2): 3},
}[SCALE]
SLOW = 50  # steps at most of what takes many milliseconds for each
CONTENDERS = {  # and their batches, the most important first
    "cuda": {
        "graph bf16": (1, 64, 16, 256, 512),
        "diffusers fp32": (1, 64),
        "diffusers bf16": (1, 64),
        "eager bf16": (1, 64),
        "graph fp16": (1, 64),
        "graph tf32": (1, 64),
        "graph fp32": (1, 64),
        "compiled+graph bf16": (64, 1),
        "compiled bf16": (64,),
        "diffusers compiled": (64, 1),
    },
    "cpu": dict.fromkeys(("diffusers fp32", "diffusers bf16", "eager fp32", "eager bf16"), (1, 16)),
    "tiny": dict.fromkeys(("diffusers fp32", "eager bf16", "compiled fp32", "diffusers compiled"), (2,)),
}[SCALE]
CASES = [
    pytest.param(model, batch, name, marks=[pytest.mark.compiled] * ("compiled" in name))
    for name, batches in CONTENDERS.items()
    for model, batch in STEPS
    if batch in batches
]
BEST = "graph" if DEVICE.type == "cuda" else "eager"
BATCHES = {"cuda": (1, 64), "cpu": (1,), "tiny": (2,)}[SCALE]
Prepared = tuple[Callable[[], object], float]  # a run of all steps to images on the host, and the seconds before it


@pytest.fixture(scope="session")
def times(ceilings):
    """{case: {contender: (seconds per step, prepare)}}, printed side by side when all are done."""
    cases = {}
    yield cases
    say(
        f"\n{'case':<24}{'contender':<22}{'ms/step':>9}{'images/s':>10}{'shipped':>10}{'fastest':>10}{'prepare, s':>12}"
    )
    for (model, batch), found in cases.items():
        theirs = {name: step for name, (step, _) in found.items() if "diffusers" in name}
        rivals = theirs.get("diffusers fp32", math.nan), min(theirs.values(), default=math.nan)
        for name, (step, prepare) in found.items():
            row = f"{f'{model}, batch {batch}':<24}{name:<22}{1e3 * step:>9.3f}{batch / step / T:>10.4g}"
            times_as_fast = (f"{rival / step:>9.2f}x" if rival == rival else f"{'-':>10}" for rival in rivals)
            say(row + "".join(times_as_fast) + f"{prepare:>12.2f}")
    say(f"images/s: with all {T} steps; shipped, fastest: times as fast as diffusers as it comes, and as its fastest")


@pytest.mark.parametrize(("model", "batch", "contender"), CASES)
def test_steps(measure, benchmark, times, model, batch, contender):
    kind, precision = contender.split()
    steps = min(STEPS[model, batch], SLOW if kind in ("diffusers", "eager") else T)
    how = diffusers if kind == "diffusers" else ours
    with how(model, batch, steps, kind, precision) as (run, prepare):
        benchmark.group = f"{model}, batch {batch}"
        rate = {"diffusers fp32": "tf32", "diffusers compiled": "bf16"}.get(contender, precision)
        facts = {"steps": steps, "prepare_s": prepare, "threads": torch.get_num_threads()}
        seconds = measure(run, steps, flops=batch * flops(model), precision=rate, rounds=5, **facts)
    times.setdefault((model, batch), {})[contender] = seconds, prepare


@contextmanager
def ours(model: str, batch: int, steps: int, kind: str, precision: str) -> Iterator[Prepared]:
    with prepared(model, batch, kind, precision) as (slots, seconds):
        table, address = SCHEDULE.table(steps), noise.address(0, batch)

        def run():
            slots.load(table, address)
            for _ in range(steps):
                slots.advance()
            return slots.x.cpu()

        yield run, seconds


@contextmanager
def prepared(model: str, batch: int, kind: str, precision: str) -> Iterator[tuple[Slots, float]]:
    """Slots at the first of T steps, gated, and the seconds from the engine's making to the end of its first step."""
    net, table, address = network(model), SCHEDULE.table(), noise.address(0, batch)
    began = time.perf_counter()
    engine = Engine(net, sample_shape(net), T, DEVICE, precision, kind)
    with engine.slots(batch, T) as slots:
        slots.load(table, address)
        slots.advance()
        wait()
        seconds = time.perf_counter() - began
        gate(slots, model, precision)
        slots.load(table, address)
        yield slots, seconds


@torch.no_grad()
def gate(slots: Slots, model: str, precision: str) -> None:
    """No timing of a wrong step: from t = 500 to x_0 it errs at most twice as much as plain torch in that precision."""
    table = Schedule(clip_sample=False).table(timesteps=[500]).to(DEVICE)
    slots.load(table, noise.address(0, len(slots.x)))
    x = slots.x[:2].clone()
    slots.advance()
    dtype = PRECISIONS[precision]
    plain, ref = reference(model).to(dtype), reference(model).double()
    t = torch.full((len(x),), 500, device=DEVICE)
    with arithmetic(precision, DEVICE):
        theirs = update(x, plain(x.to(dtype), t), table.rows[0], None, clip=False)
    want = update(x.double(), ref(x.to(dtype).double(), t), table.rows[0], None, clip=False)
    assert_as_accurate(slots.x[:2], theirs, want)


def reference(model: str) -> UNet:
    net = UNet(**network(model).config).to(DEVICE, memory_format=torch.channels_last).eval()
    net.load_state_dict(network(model).state_dict())
    return net


@contextmanager
def diffusers(model: str, batch: int, steps: int, kind: str, precision: str) -> Iterator[Prepared]:
    """As shipped for fp32; "bf16" is what its documentation tells to do first, "compiled" all that it tells."""
    if not find_spec("diffusers"):
        pytest.skip("diffusers is not installed")
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(**network(model).config).eval()
    unet.load_state_dict(network(model).state_dict())
    if precision != "fp32":
        unet.to(torch.bfloat16).to(memory_format=torch.channels_last)
    pipeline = DDPMPipeline(unet, DDPMScheduler()).to(DEVICE)
    if precision == "compiled":
        if hasattr(unet, "fuse_qkv_projections"):
            unet.fuse_qkv_projections()
        mode = "max-autotune" if DEVICE.type == "cuda" else "default"
        pipeline.unet = torch.compile(pipeline.unet, mode=mode, fullgraph=True)
    pipeline.set_progress_bar_config(disable=True)

    def run(steps=steps):
        return pipeline(batch_size=batch, num_inference_steps=steps, output_type="pt").images.cpu()

    began = time.perf_counter()
    run(3)  # compiles, and what a graph needs before its capture
    yield run, time.perf_counter() - began


@pytest.mark.parametrize("batch", BATCHES)
def test_sampler(measure, batch):
    """All that a call of the public interface does, with weights where `Sampler.from_pretrained` puts them."""
    sampler = Sampler(network("cifar10-32"), device=DEVICE, precision="bf16")
    steps = STEPS["cifar10-32", batch]
    call = partial(sampler.sample, batch, steps=steps, output="uint8", progress=False)
    began = time.perf_counter()
    call()
    first = time.perf_counter() - began
    work = steps * batch * flops("cifar10-32")
    seconds = measure(call, 1, flops=work, precision="bf16", rounds=5, steps=steps, first_call_s=first)
    say(f"    {steps} steps, the first call {first:.2f} s, another {seconds:.3f} s")


@pytest.mark.parametrize("triton_cache", ["warm", "cold"])
def test_first_image(benchmark, ceilings, tmp_path, triton_cache):
    """A new process, from its start to the first image of a checkpoint; warm: its kernels have been compiled before."""
    net = network("cifar10-32")
    checkpoint.save(tmp_path / "model", net.config, net.state_dict(), SCHEDULE)
    steps = str({"cuda": T, "cpu": 5, "tiny": 2}[SCALE])
    script = Path(__file__).with_name("first_image.py")

    def first_image():
        command = [sys.executable, script, tmp_path / "model", DEVICE.type, BEST, steps, str(time.time())]
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        return json.loads(done.stdout.splitlines()[-1])

    compiled_before = triton_cache == "warm" and DEVICE.type == "cuda"
    parts = benchmark.pedantic(first_image, warmup_rounds=compiled_before)
    benchmark.extra_info.update(parts_s=parts, total_s=sum(parts.values()))
    say(f"{benchmark.name}: {sum(parts.values()):.2f} s: {parts}")


@pytest.mark.parametrize("kind", ["graph", "eager"] if DEVICE.type == "cuda" else ["eager"])
@pytest.mark.parametrize("batch", BATCHES)
def test_kinds_of_kernels(measure, benchmark, batch, kind):
    """Where the time of a step goes. Gaps are what is left of it without a profiler: nothing runs."""
    steps = {"cuda": 50, "cpu": 3, "tiny": 2}[SCALE]
    with prepared("cifar10-32", batch, kind, "bf16") as (slots, _):

        def run():
            for _ in range(steps):
                slots.advance()
            wait()

        seconds = measure(run, steps, flops=batch * flops("cifar10-32"), precision="bf16", rounds=5)
        found = kinds.microseconds(run)
    assert any(found.values()), "the profiler saw no kernel"
    times = {name: names.total() / 1e6 / steps for name, names in found.items()}
    times["gaps"] = seconds - sum(times.values())
    names = {name: dict(found[name].most_common(10)) for name in found}
    benchmark.extra_info.update(kinds_s=times, names_us={"steps": steps} | names)
    for name, time_s in times.items():
        say(f"    {name:<20}{1e6 * time_s:>10.1f} us{time_s / seconds:>6.0%}")


@pytest.mark.parametrize("kind", ["graph", "eager"] if DEVICE.type == "cuda" else ["eager"])
@pytest.mark.parametrize(("precision", "batch"), [(p, n) for n in BATCHES for p in ("bf16", "fp32")])
def test_memory(benchmark, ceilings, precision, batch, kind):
    """The peak of sampling, all that the engine makes included, beside the sum of what it has to hold.

    The peak of a bare forward pass, above its inputs, stands for the activations and the output.
    """
    net, dtype = network("cifar10-32"), PRECISIONS[precision]
    held = held_by_the_network(net, batch, precision)
    held["state"] = 4 * batch * math.prod(sample_shape(net))
    held["low-precision copy"] = 0 if dtype == torch.float32 else held["state"] // 2

    def sample():
        engine = Engine(net, sample_shape(net), T, DEVICE, precision, kind)
        with engine.slots(batch, T) as slots:
            slots.load(SCHEDULE.table(), noise.address(0, batch))
            for _ in range(2):
                slots.advance()

    peak = benchmark.pedantic(peak_bytes, args=(sample,))
    benchmark.extra_info.update(peak_bytes=peak, held_bytes=held)
    sizes = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in held.items())
    say(f"{benchmark.name}: peak {peak / 1e6:.1f} MB, {peak / sum(held.values()):.2f} x ({sizes})")


@torch.no_grad()
def held_by_the_network(net: UNet2D, batch: int, precision: str) -> dict[str, int]:
    fast = net.for_inference(PRECISIONS[precision], DEVICE)
    x = layout.empty(batch, sample_shape(net), dtype=PRECISIONS[precision], device=DEVICE).normal_()
    with arithmetic(precision, DEVICE):
        rows = fast.time_rows(torch.arange(T, device=DEVICE))
        rows = rows if ops.backend(DEVICE) == "triton" else rows.to(x.dtype)
        forward = partial(fast.denoise, x, rows[:1])
        forward()  # what libraries make once
        activations = peak_bytes(forward)
    weights = sum(parameter.nbytes for parameter in fast.parameters())
    return {"weights": weights, "time rows": rows.nbytes, "activations": activations}
