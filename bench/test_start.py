"""The time until the first image: in a new process, and with a new network in a running process."""

import inspect
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor

from bench import first_image
from bench.contenders import SCHEDULE, T, contender, loop
from bench.layouts import network
from bench.machine import DEVICE, SCALE, same_bits, say
from fastddpm import Sampler, checkpoints

BEST = "graph" if DEVICE.type == "cuda" else "eager"
STEPS = {"cuda": T, "cpu": 5, "tiny": 2}[SCALE]  # of the first image
ROUNDS = 1 if SCALE == "tiny" else 3
PREPARED = [
    "fastddpm eager bf16",
    *["fastddpm graph bf16"] * (DEVICE.type == "cuda"),
    *["diffusers eager fp32", "diffusers eager bf16"] * (SCALE != "tiny"),
    pytest.param("fastddpm compiled bf16", marks=pytest.mark.compiled),
    *[pytest.param("diffusers compiled bf16", marks=pytest.mark.compiled)] * (SCALE != "tiny"),
]
wall = pytest.mark.benchmark(timer=time.perf_counter)


@wall
@pytest.mark.parametrize(
    ("name", "triton_cache"),
    [(f"fastddpm {BEST} bf16", "warm"), (f"fastddpm {BEST} bf16", "cold"), ("diffusers eager fp32", "warm")],
)
def test_first_image(benchmark, record, tmp_path, name, triton_cache):
    """From the start of a new process to the first image of a checkpoint; warm: its kernels were compiled before.

    Ours is judged: it equals the image that this process draws.
    """
    who, net, found = contender(name), network("cifar10-32"), []
    checkpoints.save(tmp_path / "model", net.config, net.state_dict(), SCHEDULE)
    script, image = inspect.getsourcefile(first_image.main), tmp_path / "image.npy"

    def draw():
        model = [str(tmp_path / "model"), DEVICE.type, who.engine, str(STEPS)]
        command = [sys.executable, script, who.who, *model, str(image), str(time.time())]
        cache = tmp_path / ("cache" if triton_cache == "warm" else f"cache{len(found)}")
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        found.append(json.loads(done.stdout.splitlines()[-1]))

    warm = triton_cache == "warm" and who.who == "fastddpm" and DEVICE.type == "cuda"
    rounds = ROUNDS if who.who == "fastddpm" else 1  # diffusers takes half a minute on a GPU
    benchmark.pedantic(draw, rounds=rounds, warmup_rounds=warm)
    errors = None
    if who.who == "fastddpm":
        sampler = Sampler.from_pretrained(tmp_path / "model", device=DEVICE, precision="bf16", engine=BEST)
        here = sampler.sample(1, steps=STEPS, output="uint8", progress=False)
        errors = same_bits(torch.as_tensor(np.load(image)).int(), torch.as_tensor(here).cpu().int())
    timed = found[warm:]
    samples = [sum(parts.values()) for parts in timed]
    facts = {"parts_s": timed, "steps": STEPS, "kernels": triton_cache}
    group = f"first image of a new process, {triton_cache}"
    record(
        samples_s=samples,
        clock="wall",
        group=group,
        contender=name,
        images=1,
        precision=who.ceiling,
        errors=errors,
        facts=facts,
    )
    benchmark.extra_info.update(facts)
    for seconds, parts in zip(samples, timed, strict=True):
        say(f"{benchmark.name}: {seconds:.2f} s: {parts}")


@wall
@pytest.mark.parametrize("name", PREPARED)
def test_prepare(benchmark, record, name):
    """From a float32 network to the end of a first step: converting weights, compiling code, capturing a graph."""
    who, seconds = contender(name), []

    def prepare():
        torch.compiler.reset()
        with loop("cifar10-32", 1, 1, who) as ready:
            seconds.append(ready.seconds)
            return ready.errors

    with inductor.patch(force_disable_caches=True):
        errors = benchmark.pedantic(prepare, rounds=1 if who.engine == "compiled" else ROUNDS)
    record(
        samples_s=seconds,
        clock="wall",
        group="from a network to its first step",
        contender=name,
        precision=who.ceiling,
        errors=errors,
    )
    say(f"{benchmark.name}: {', '.join(f'{each:.2f} s' for each in seconds)}")
