"""Peak memory of sampling, all that the engine makes included, beside the sum of what it has to hold."""

import math
from functools import partial

import pytest
import torch

from bench.contenders import SCHEDULE, T
from bench.layouts import network
from bench.machine import DEVICE, SCALE, peak_bytes, say
from fastddpm import UNet2D, layout, noise, ops
from fastddpm.engine import PRECISIONS, Engine, arithmetic
from fastddpm.sampler import sample_shape

BATCHES = {"cuda": (1, 64), "cpu": (1,), "tiny": (2,)}[SCALE]


@pytest.mark.parametrize("kind", ["graph", "eager"] if DEVICE.type == "cuda" else ["eager"])
@pytest.mark.parametrize(("precision", "batch"), [(p, n) for n in BATCHES for p in ("bf16", "fp32")])
def test_memory(benchmark, record, precision, batch, kind):
    """The peak of a bare forward pass, above its inputs, stands for the activations and the output."""
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
    record(facts={"peak_bytes": peak, "held_bytes": held}, precision=precision)
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
