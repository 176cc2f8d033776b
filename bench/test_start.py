"""How long it takes until the first image: of a new process, and of each engine in one that runs."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from bench.contenders import SCHEDULE, Contender, T, judge_a_step, slots_of
from bench.layouts import network
from bench.machine import DEVICE, SCALE, say, wait
from fastddpm import checkpoint, noise

BEST = "graph" if DEVICE.type == "cuda" else "eager"
STEPS = {"cuda": T, "cpu": 5, "tiny": 2}[SCALE]  # of the first image
ENGINES = ["eager", *(["graph"] if DEVICE.type == "cuda" else []), pytest.param("compiled", marks=pytest.mark.compiled)]
wall = pytest.mark.benchmark(timer=time.perf_counter)


@wall
@pytest.mark.parametrize("triton_cache", ["warm", "cold"])
def test_first_image(benchmark, record, tmp_path, triton_cache):
    """A new process, from its start to the first image of a checkpoint; warm: its kernels have been compiled before."""
    net, found = network("cifar10-32"), []
    checkpoint.save(tmp_path / "model", net.config, net.state_dict(), SCHEDULE)
    script = Path(__file__).with_name("first_image.py")

    def first_image():
        command = [sys.executable, script, tmp_path / "model", DEVICE.type, BEST, str(STEPS), str(time.time())]
        cache = tmp_path / ("cache" if triton_cache == "warm" else f"cache{len(found)}")
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        found.append(json.loads(done.stdout.splitlines()[-1]))

    warm = triton_cache == "warm" and DEVICE.type == "cuda"
    benchmark.pedantic(first_image, rounds=1 if SCALE == "tiny" else 3, warmup_rounds=warm)
    timed = found[warm:]
    samples = [sum(parts.values()) for parts in timed]
    facts = {"parts_s": timed, "steps": STEPS}
    record(samples_s=samples, clock="wall", cache=triton_cache, precision="bf16", facts=facts)
    benchmark.extra_info.update(facts)
    for seconds, parts in zip(samples, timed, strict=True):
        say(f"{benchmark.name}: {seconds:.2f} s: {parts}")


@wall
@pytest.mark.parametrize("engine", ENGINES)
def test_prepare(benchmark, record, engine):
    """From the engine's making to the end of its first step: weights converted, code compiled, a graph captured."""
    who = Contender("fastddpm", engine, "bf16")

    with ExitStack() as stack, inductor.patch(force_disable_caches=True):

        def first_step():
            torch.compiler.reset()
            slots = stack.enter_context(slots_of("cifar10-32", 1, who))
            slots.load(SCHEDULE.table(), noise.address(0, 1))
            slots.advance()
            wait()
            return slots

        slots = benchmark.pedantic(first_step, rounds=1 if engine == "compiled" else 3)
        errors = judge_a_step(slots, "cifar10-32", who.precision)
    if not benchmark.disabled:
        samples = list(benchmark.stats.stats.data)
        record(samples_s=samples, clock="wall", precision=who.precision, errors=errors)
        say(f"{benchmark.name}: {', '.join(f'{seconds:.2f} s' for seconds in samples)}")
