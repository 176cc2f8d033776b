"""Whole sampling next to the reference and diffusers' pipeline, same weights and batch: pytest bench/test_sampling.py

Runs have fewer than 1000 steps where those would take long. All steps are the same work, so images/s are scaled to
1000. The column "prepare" is the work before the steps: converting weights, compiling code, capturing a graph.
"""

import math
from functools import partial

import pytest

from bench import kinds
from bench.contenders import SCHEDULE, Contender, T, contender, judge_a_step, loop, runner_of
from bench.layouts import flops, moved, network
from bench.machine import DEVICE, SCALE, same_bits, say
from bench.traffic import Operations
from fastddpm import Sampler
from fastddpm.core import noise
from fastddpm.core.precision import has_native_bf16

STEPS = {  # of a run: a second or two at most
    "cuda": {
        ("cifar10-32", 1): 1000, ("cifar10-32", 64): 200, ("cifar10-32", 16): 500, ("cifar10-32", 256): 50,
        ("cifar10-32", 512): 25, ("celebahq-256", 1): 100, ("celebahq-256", 16): 10,
    },
    "cpu": {("cifar10-32", 1): 20, ("cifar10-32", 16): 4, ("shipped", 1): 50, ("shipped", 16): 20},
    "tiny": {("cifar10-32", 2): 3},
}[SCALE]  # fmt: skip
SLOW = 20  # the most steps of contenders that take many milliseconds per step
CONTENDERS = {  # {contender: batches}, the most important first
    "cuda": {
        "fastddpm graph bf16": (1, 64, 16, 256, 512),
        "diffusers eager fp32": (1, 64),
        "diffusers eager bf16": (1, 64),
        "fastddpm eager bf16": (1, 64),
        "fastddpm graph fp16": (1, 64),
        "fastddpm graph tf32": (1, 64),
        "fastddpm graph fp32": (1, 64),
        "reference eager fp32": (1, 64),
        "fastddpm compiled+graph bf16": (64, 1),
        "fastddpm compiled bf16": (64,),
        "diffusers compiled bf16": (64, 1),
    },
    "cpu": dict.fromkeys(
        (
            "fastddpm eager bf16",
            "fastddpm eager fp32",
            "onnxruntime exported fp32",
            "openvino exported fp32",
            "openvino exported bf16",
            "diffusers compiled+frozen fp32",
            "diffusers compiled+frozen bf16",
            "diffusers eager fp32",
            "diffusers eager bf16",
            "reference eager fp32",
        ),
        (1, 16),
    ),
    "tiny": dict.fromkeys(
        (
            *["fastddpm graph bf16"] * (DEVICE.type == "cuda"),
            "fastddpm eager bf16",
            "fastddpm compiled fp32",
            "diffusers eager fp32",
            "reference eager fp32",
            *["onnxruntime exported fp32", "openvino exported fp32"] * (DEVICE.type == "cpu"),
        ),
        (2,),
    ),
}[SCALE]
COMPILED = "compiled bf16" if DEVICE.type == "cuda" else "compiled+frozen fp32"  # of diffusers
LARGE = ("fastddpm graph bf16", "diffusers eager fp32", "diffusers eager bf16")  # at 256 pixels
CASES = [
    pytest.param(model, batch, name, marks=[pytest.mark.compiled] * ("compiled" in name))
    for name, batches in CONTENDERS.items()
    for model, batch in STEPS
    if (name in LARGE if model == "celebahq-256" else batch in batches)
]
BATCHES = {"cuda": (1, 64), "cpu": (1,), "tiny": (2,)}[SCALE]
PROFILED = {  # steps
    "cuda": {("cifar10-32", 1): 50, ("cifar10-32", 64): 50},
    "cpu": {("cifar10-32", 1): 5, ("shipped", 1): 50, ("shipped", 16): 5},
    "tiny": {("cifar10-32", 2): 2},
}[SCALE]


@pytest.fixture(scope="session")
def times(run):
    """{case: {contender: (seconds per step, prepare)}}, printed side by side at the end."""
    cases = {}
    yield cases
    say(
        f"\n{'case':<24}{'contender':<30}{'ms/step':>9}{'images/s':>10}{'x GFLOP':>10}{'default':>10}{'compiled':>10}"
        f"{'prepare, s':>12}"
    )
    for (model, batch), found in cases.items():
        theirs = {name: step for name, (step, _) in found.items()}
        rivals = [theirs.get(f"diffusers {setting}", math.nan) for setting in ("eager fp32", COMPILED)]
        for name, (step, prepare) in found.items():
            rate = batch / step / T
            row = f"{f'{model}, batch {batch}':<24}{name:<30}{1e3 * step:>9.3f}{rate:>10.4g}"
            row += f"{rate * T * flops(model) / 1e12:>10.3g}"
            times_as_fast = (f"{rival / step:>9.2f}x" if rival == rival else f"{'-':>10}" for rival in rivals)
            say(row + "".join(times_as_fast) + f"{prepare:>12.2f}")
    ceilings = ", ".join(f"{name} {rate:.3g}" for name, rate in run["ceilings"].items() if name != "copy")
    say(
        f"images/s: with all {T} steps; x GFLOP: images/s x GFLOP of an image, in TFLOP/s (ceilings: {ceilings});\n"
        "default, compiled: speed relative to diffusers with its defaults, and with torch.compile"
    )


@pytest.mark.parametrize(("model", "batch", "name"), CASES)
def test_steps(measure, times, model, batch, name):
    who = contender(name)
    fast = who.precision in ("bf16", "fp16") and (who.engine == "compiled" or "graph" in who.engine)
    steps = min(STEPS[model, batch], T if fast else SLOW)
    with loop(model, batch, steps, who) as ready:
        operations = None
        if who.who == "fastddpm" and who.engine == "eager":
            with Operations() as counted:
                ready.run()
            operations = round(counted.count / steps)
        seconds = measure(
            ready.run,
            steps,
            group=f"sampling, {model}, batch {batch}",
            contender=name,
            bytes_moved=moved(model, batch, who.precision),
            flops=batch * flops(model),
            images=batch / T,
            precision=who.ceiling,
            errors=ready.errors,
            facts={"steps": steps, "prepare_s": ready.seconds, "torch_operations": operations},
        )
    times.setdefault((model, batch), {})[name] = seconds, ready.seconds


@pytest.mark.parametrize("batch", BATCHES)
def test_sampler(measure, batch):
    """All that a call of the public interface does, with the weights where `Sampler.from_pretrained` puts them."""
    sampler = Sampler(network("cifar10-32"), SCHEDULE, device=DEVICE, precision="bf16")
    steps = STEPS["cifar10-32", batch]
    with loop("cifar10-32", batch, steps, Contender("fastddpm", "eager", "bf16")) as judged:
        errors = same_bits(sampler.sample(batch, steps=steps, progress=False).cpu(), judged.run())
    call = partial(sampler.sample, batch, steps=steps, output="uint8", progress=False)
    work = steps * batch * flops("cifar10-32")
    seconds = measure(
        call,
        1,
        bytes_moved=steps * moved("cifar10-32", batch, "bf16"),
        flops=work,
        images=batch * steps / T,
        precision="bf16",
        errors=errors,
        facts={"steps": steps},
    )
    say(f"    {steps} steps in {seconds:.3f} s")


@pytest.mark.parametrize("engine", ["graph", "eager"] if DEVICE.type == "cuda" else ["eager"])
@pytest.mark.parametrize(("model", "batch"), PROFILED)
def test_kinds_of_kernels(measure, record, model, batch, engine):
    """Where the time of a step goes. "gaps" is what is left of its time without a profiler: on a GPU nothing runs then;
    on a CPU it is the update, and everything in Python."""
    steps = PROFILED[model, batch]
    who = Contender("fastddpm", engine, "bf16" if DEVICE.type == "cuda" or has_native_bf16(DEVICE) else "fp32")
    with runner_of(model, batch, who) as runner:
        errors = judge_a_step(runner, model, who)

        def start():
            runner.load(SCHEDULE.table(), noise.address(0, batch))
            runner.start()

        def run():
            for _ in range(steps):
                runner.step()

        seconds = measure(
            run,
            steps,
            bytes_moved=moved(model, batch, who.precision),
            flops=batch * flops(model),
            precision=who.precision,
            before=start,
            errors=errors,
        )
        start()
        found = kinds.microseconds(run)
    assert any(found.values()), "the profiler saw no kernel"
    times = {name: names.total() / 1e6 / steps for name, names in found.items()}
    times["gaps"] = seconds - sum(times.values())
    names = {name: dict(found[name].most_common(10)) for name in found}
    record(facts={"kinds_s": times, "names_us": {"steps": steps} | names})
    for name, time_s in times.items():
        say(f"    {name:<20}{1e6 * time_s:>10.1f} us{time_s / seconds:>6.0%}")
