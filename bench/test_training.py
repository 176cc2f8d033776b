"""Training next to the matmul ceiling and diffusers' example: pytest bench/test_training.py

A step is everything: a batch, noise, forward, loss, backward, clipping, AdamW and the moving average of the weights.
Steps follow each other as in a run. The images are random and on the device; there is no dropout.

"diffusers" is its unconditional example, in bf16 by autocast, without what the example waits for: its images are floats
already, and the loss is not printed.
"""

import time
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.contenders import SCHEDULE, Contender, T, contender, reference, theirs
from bench.layouts import flops, network
from bench.machine import DEVICE, SCALE, Call, judged, repeated, say, wait
from fastddpm import checkpoints, ops
from fastddpm.core import noise
from fastddpm.core.precision import PRECISIONS, arithmetic
from fastddpm.processes.distributed import Ranks
from fastddpm.reference.diffusion import Diffusion
from fastddpm.sampling.arguments import sample_shape
from fastddpm.train import TrainOptions
from fastddpm.train.batches import draws
from fastddpm.train.trainer import Trainer

BATCHES = {
    "cuda": {"cifar10-32": (128, 512), "shipped": (128,)},
    "cpu": {"cifar10-32": (8,), "shipped": (128,)},
    "tiny": {"cifar10-32": (32,)},
}[SCALE]
CONTENDERS = {
    "cuda": [
        "fastddpm eager bf16", "diffusers eager bf16", "diffusers eager fp32", "fastddpm eager tf32",
        "fastddpm eager fp32", "fastddpm compiled bf16", "fastddpm compiled+graph bf16", "diffusers compiled bf16",
        "fastddpm compiled fp32", "fastddpm compiled+graph fp32",
    ],
    "cpu": [
        "fastddpm eager bf16", "fastddpm eager fp32", "diffusers eager fp32", "diffusers eager bf16",
        "fastddpm compiled bf16", "fastddpm compiled fp32", "diffusers compiled bf16",
    ],
    "tiny": [
        "fastddpm eager bf16", "fastddpm eager fp32", "diffusers eager fp32", "diffusers eager bf16",
        *["fastddpm compiled+graph bf16"] * (DEVICE.type == "cuda"),
    ],
}[SCALE]  # fmt: skip
COMPILED = 128  # the largest batch for which everything is compiled; above it, only ours without graphs
CASES = [
    pytest.param(model, batch, name, marks=[pytest.mark.compiled] * ("compiled" in name))
    for name in CONTENDERS
    for model, batches in BATCHES.items()
    for batch in batches
    if "compiled" not in name or batch <= COMPILED or name == "fastddpm compiled bf16"
]
MEMORY = {"fastddpm": torch.channels_last, "diffusers": torch.contiguous_format}  # of images and weights
PROCESS = Diffusion(SCHEDULE.betas)
IMAGES = 1024
CLIP = TrainOptions().grad_clip  # the example's, too
PART = 32  # images
WARM_UP = 3  # steps until graphs are replayed
SECONDS = 0.01 if SCALE == "tiny" else 0.5  # of steps in a row, with one wait for the GPU at their end


@pytest.mark.parametrize(("model", "batch", "name"), CASES)
def test_training(measure, model, batch, name):
    who = contender(name)
    ready = training(model, batch, who)
    run, n = repeated(ready.step, SECONDS, captured=False)
    seconds = measure(
        run,
        n,
        group=f"training, {model}, batch {batch}",
        contender=name,
        flops=3 * batch * flops(model),  # backward makes two products for each of forward
        images=batch,
        precision=who.ceiling,
        errors=ready.errors,
        facts=ready.facts,
    )
    peak = ready.facts.get("peak_bytes")
    say(f"{'':<72} {batch / seconds:>10.1f} images/s" + (f", at most {peak / 1e9:.3g} GB" if peak else ""))


class Ready(NamedTuple):
    """A contender after some steps. step: takes another; errors: those at the gate; facts: of those steps."""

    step: Call
    errors: dict[str, Any]
    facts: dict[str, float]


class Gradients(NamedTuple):
    """The gradients of the first batch's loss, which are judged: in the loss itself, a sum, errors may cancel.

    Attributes:
        returned: [N, C, H, W], with respect to the network's output.
        weights: [P], with respect to all of its P weights, in the order of their names, and clipped.
    """

    returned: Tensor
    weights: Tensor


def training(model: str, batch: int, who: Contender) -> Ready:
    """Return a contender that is judged by both gradients of its first batch.

    Raises: AssertionError: one of them errs more than twice as much as plain torch's.
    """
    plain, ref = expected(model, batch, who.ceiling, MEMORY[who.who]), exact(model, batch)
    wait()
    held = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    began = time.perf_counter()
    gradients, step = (_ours if who.who == "fastddpm" else _theirs)(model, batch, who)
    found = gradients()
    wait()
    ready = time.perf_counter()
    errors = judged(found.returned, plain.returned, ref.returned)
    try:
        of_weights = judged(found.weights, plain.weights, ref.weights)
    except AssertionError as error:
        raise AssertionError(f"gradient of weights: {error}") from None
    errors |= {f"{name} of weights": error for name, error in of_weights.items()}
    del found  # otherwise it would count as memory of a step
    began += time.perf_counter() - ready
    for _ in range(WARM_UP):
        step()
    wait()
    facts = {"prepare_s": time.perf_counter() - began}
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        wait()
        facts["peak_bytes"] = torch.cuda.max_memory_allocated() - held
    return Ready(step, errors, facts)


Made = tuple[Callable[[], Gradients], Call]  # a function that returns the gradients, and one that takes a step


def _ours(model: str, batch: int, who: Contender) -> Made:
    """The gradients are those of its first step."""
    net, right, seen = network(model), ops.eps_loss, []
    with TemporaryDirectory() as folder:
        init = Path(folder) / "init"
        checkpoints.save(init, net.config, net.state_dict(), SCHEDULE)
        options = TrainOptions(batch_size=batch, precision=who.precision, engine=who.engine, init=str(init))
        trainer = Trainer(pictures(model), None, Path(folder) / "run", options, Ranks(device=DEVICE))
    trained, numbers = trainer.wrapped_network(), count()

    def step() -> object:
        return trainer.step(trained, next(numbers))

    def eps_loss(m: Tensor, *others: Any, **how: Any) -> Tensor:
        m.register_hook(seen.append)
        return right(m, *others, **how)

    def gradients() -> Gradients:
        with patch.object(ops, "eps_loss", eps_loss):
            step()
        return Gradients(seen.pop(), in_weights(trainer.net))

    return gradients, step


def _theirs(model: str, batch: int, who: Contender) -> Made:
    """Uses the options of the example."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    unet, scheduler, dtype = theirs(model).train(), DDPMScheduler(), PRECISIONS[who.precision]
    weights = list(unet.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=20_000)
    average = EMAModel(weights, decay=0.9999, use_ema_warmup=True, inv_gamma=1, power=3 / 4)
    trained = torch.compile(unet) if who.engine == "compiled" else unet
    data = torch.from_numpy(pictures(model)).movedim(-1, 1).contiguous().to(DEVICE) / 127.5 - 1

    def predicted(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            return trained(x_t, t, return_dict=False)[0].float()

    def gradients() -> Gradients:
        x_0, t, eps = first_batch(model, batch)
        x_t = PROCESS.noised(x_0.float(), t, eps)  # the coefficients of the scheduler are less exact
        found = gradients_of(predicted, unet, x_t.contiguous(), t, eps)
        optimizer.zero_grad()
        return found

    def step() -> None:
        x_0 = data[torch.randint(IMAGES, (batch,), device=DEVICE)]
        t, eps = torch.randint(T, (batch,), device=DEVICE), torch.randn(x_0.shape, device=DEVICE)
        F.mse_loss(predicted(scheduler.add_noise(x_0, eps, t), t), eps).backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(weights)

    return gradients, step


@cache
def expected(model: str, batch: int, precision: str, memory: torch.memory_format) -> Gradients:
    """Return plain torch's gradients in that precision. Each memory format has its own order of sums, and errors."""
    (x_0, t, eps), net, dtype = (
        first_batch(model, batch),
        reference(model).to(memory_format=memory),
        PRECISIONS[precision],
    )

    def predicted(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            return net(x_t, t)

    x_t = PROCESS.noised(x_0.float(), t, eps).contiguous(memory_format=memory)
    with arithmetic(precision, DEVICE):
        return gradients_of(predicted, net, x_t, t, eps)


@cache
def exact(model: str, batch: int) -> Gradients:
    """Return the float64 gradients, in parts: a GPU could not hold the backward pass of a large batch."""
    (x_0, t, eps), net = first_batch(model, batch), reference(model).double()
    return gradients_of(net, net, PROCESS.noised(x_0, t, eps.double()), t, eps.double(), part=PART)


def gradients_of(
    predicted: Callable[[Tensor, Tensor], Tensor], net: nn.Module, *batch: Tensor, part: int | None = None
) -> Gradients:
    """Return the gradients of the mean squared error between eps and what `predicted` computes from x_t and t.

    Args:
        predicted: the network, perhaps in another form.
        net: the network.
        batch: x_t, t and eps, of N images.
        part: the number of images at a time; by default all.
    """
    seen, total = [], batch[-1].numel()
    for x_t, t, eps in zip(*(each.split(part or len(each)) for each in batch), strict=True):
        m = predicted(x_t, t)
        m.retain_grad()
        (F.mse_loss(m.to(eps.dtype), eps, reduction="sum") / total).backward()
        seen.append(m.grad)
    nn.utils.clip_grad_norm_(net.parameters(), CLIP)
    return Gradients(torch.cat(seen), in_weights(net))


def in_weights(net: nn.Module) -> Tensor:
    """Return the gradients of all weights as one tensor, a copy."""
    return torch.cat([weight.grad.flatten() for _, weight in sorted(net.named_parameters())])


def first_batch(model: str, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_0 in float64, t and eps of our first step."""
    index, t, _, address = (drawn.to(DEVICE) for drawn in draws(0, IMAGES, TrainOptions(batch_size=batch)))
    x_0 = torch.from_numpy(pictures(model)).to(DEVICE).movedim(-1, 1)[index]
    return (x_0.double() - 127.5) / 127.5, t, noise.normal(address, x_0.shape[1:], stream=noise.TRAIN, t=0)


def pictures(model: str) -> np.ndarray:
    """Return random images: [N, H, W, C] uint8."""
    channels, *sides = sample_shape(network(model))
    return np.random.default_rng(0).integers(256, size=(IMAGES, *sides, channels), dtype=np.uint8)
