"""Peak memory of sampling, with all preparation, next to the sum of what fastddpm has to hold."""

import math
from functools import partial

import pytest
import torch

from bench.contenders import T, contender, loop
from bench.layouts import network
from bench.machine import DEVICE, SCALE, peak_bytes, say
from fastddpm import UNet2D, ops
from fastddpm.core import layout
from fastddpm.core.precision import PRECISIONS, arithmetic
from fastddpm.networks.planned import fastest_forward
from fastddpm.sampling.arguments import sample_shape

BATCHES = {"cuda": (1, 64), "cpu": (1,), "tiny": (2,)}[SCALE]
ENGINES = ["graph", "eager"] if DEVICE.type == "cuda" else ["eager"]
CONTENDERS = [
    *(f"fastddpm {engine} {precision}" for engine in ENGINES for precision in ("bf16", "fp32")),
    *("diffusers eager bf16", "diffusers eager fp32", "reference eager fp32"),
]


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("batch", BATCHES)
def test_memory(benchmark, record, batch, name):
    """Two steps. Theirs also counts its own float32 network; ours takes its weights from one that exists before."""
    who, errors = contender(name), []

    def sample():
        with loop("cifar10-32", batch, 2, who) as ready:
            ready.run()
            errors.append(ready.errors)

    network("cifar10-32")
    sample()  # does all one-time work, and computes the results to judge by
    peak = benchmark.pedantic(peak_bytes, args=(sample,))
    held = held_by_the_network(batch, who.precision) if who.who == "fastddpm" else {}
    facts = {"peak_bytes": peak, "held_bytes": held}
    group = f"memory, cifar10-32, batch {batch}"
    record(facts=facts, group=group, contender=name, precision=who.ceiling, errors=errors[-1])
    benchmark.extra_info.update(facts)
    sizes = ", ".join(f"{what} {size / 1e6:.1f}" for what, size in held.items())
    say(
        f"{benchmark.name}: peak {peak / 1e6:.1f} MB"
        + (f", {peak / sum(held.values()):.2f} x ({sizes})" if held else "")
    )


@torch.no_grad()
def held_by_the_network(batch: int, precision: str) -> dict[str, int]:
    """The peak of a bare forward pass, above its inputs, stands for the activations and the output."""
    net, dtype = network("cifar10-32"), PRECISIONS[precision]
    fast: UNet2D = net.for_inference(dtype, DEVICE)
    x = layout.empty(batch, sample_shape(net), dtype=dtype, device=DEVICE).normal_()
    with arithmetic(precision, DEVICE):
        rows = fast.time_rows(torch.arange(T, device=DEVICE))
        rows = rows if ops.backend(DEVICE) != "torch" else rows.to(x.dtype)
        forward = partial(fastest_forward(fast), x, rows[:1])
        forward()  # libraries do some work once
        activations = peak_bytes(forward)
    state = 4 * batch * math.prod(sample_shape(net))
    return {
        "weights": sum(parameter.nbytes for parameter in fast.parameters()),
        "time rows": rows.nbytes,
        "activations": activations,
        "state": state,
        "low-precision copy": 0 if dtype == torch.float32 else state // 2,
    }
