"""The cost of writing to a job of many samples: its time next to that of drawing the same samples without writing."""

import json
import time
from itertools import count
from statistics import median

import numpy as np
import pytest
import torch
from torch import nn

from bench.contenders import SCHEDULE
from bench.layouts import network
from bench.machine import DEVICE, SCALE, same_bits, say, wait
from fastddpm import Sampler
from fastddpm.sampling.job import sample_to
from fastddpm.storage.shards import FORMATS

SHARDS, SIZE, STEPS = {"cuda": (3, 128, 1000), "cpu": (8, 64, 100), "tiny": (2, 4, 2)}[SCALE]
ROUNDS = {"cuda": 1, "cpu": 5, "tiny": 1}[SCALE]
MODELS = ["cifar10-32", "trivial"] if DEVICE.type == "cuda" else ["trivial"]


class Trivial(nn.Module):
    """A network so fast that writing dominates."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x / 2


@pytest.mark.benchmark(timer=time.perf_counter)
@pytest.mark.parametrize("format", [form for form in FORMATS if form != "wav"])
@pytest.mark.parametrize("model", MODELS)
def test_output(benchmark, record, tmp_path, model, format):
    """Drawing and jobs take turns. The time of a job is from its first step until everything is on the disk."""
    net = network(model) if model != "trivial" else Trivial()
    sampler = Sampler(net, SCHEDULE, shape=(3, 32, 32), device=DEVICE, precision="bf16")
    drawn, written, folders = [], [], (tmp_path / str(k) for k in count())

    def draw():
        began = time.perf_counter()
        shards = torch.arange(SHARDS * SIZE).split(SIZE)
        x = [sampler.sample(shard, steps=STEPS, output="uint8", progress=False) for shard in shards]
        wait()
        drawn.append(time.perf_counter() - began)
        return torch.cat(x)

    def work():
        out = next(folders)
        log = out.with_suffix(".jsonl")
        store = sample_to(
            out, sampler, SHARDS * SIZE, format=format, shard_size=SIZE, batch_size=SIZE, steps=STEPS, json_log=log,
            progress=False,
        )  # fmt: skip
        written.append(json.loads(log.read_text().splitlines()[-1])["seconds"])
        return store

    def turn():
        draw()

    want = draw()  # also warms up
    errors = same_bits(torch.from_numpy(np.concatenate(list(work().arrays()))).int(), want.int())
    del drawn[:], written[:]
    benchmark.pedantic(work, setup=turn, rounds=ROUNDS)
    lost = 1 - median(drawn) / median(written)
    facts = {"drawing_s": drawn, "lost": lost, "steps": STEPS, "shards": SHARDS, "model": model}
    group = f"{SHARDS} x {SIZE} images of 32 x 32 in {STEPS} steps, {model}"
    samples = [seconds / SHARDS for seconds in written]
    record(samples_s=samples, clock="wall", group=group, contender=format, images=SIZE, errors=errors, facts=facts)
    benchmark.extra_info.update(facts)
    say(f"{benchmark.name}: {median(written):.2f} s, of them {lost:.1%} for output")
