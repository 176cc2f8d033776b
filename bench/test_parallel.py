"""The latency of one sample, one step at a time and parallel in time: pytest bench/test_parallel.py

On a CPU a call of the network takes W times as long for W slots, so there compare the numbers of calls.
"""

import time
from functools import partial

import pytest

from bench import rounds
from bench.machine import SCALE, say

wall = pytest.mark.benchmark(timer=time.perf_counter, min_rounds=1 if SCALE != "cuda" else 5)


@wall
@pytest.mark.parametrize(("mode", "precision", "window"), rounds.CASES)
def test_one_sample(measure, mode, precision, window):
    sampler = rounds.sampler(precision)
    errors, facts = rounds.judge(sampler, mode, window), rounds.facts(sampler, mode, window)
    call = partial(rounds.draw, sampler, mode, window)
    measure(call, 1, group="one sample", precision=precision, images=1, errors=errors, facts=facts)
    say("    " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in facts.items()))
