"""Memory rates of the kernels next to that of a device copy, and to plain torch: pytest bench/test_kernels.py

The target is 90 % of the copy's rate from 64 Mi elements on. The smaller shapes are those of sampling. No call finds
its inputs in the caches, except in the "hot" cases.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders import MIDDLE, SCHEDULE, T, contender
from bench.machine import DEVICE, SCALE, Call, judged, repeated, rotated, same_bits, say
from bench.traffic import Bytes
from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.reference.diffusion import Diffusion, add_noise, guided, linear_betas, squared_error, update

SHAPES = {
    "cuda": [(21_846, 3, 32, 32), (342, 3, 256, 256), (64, 3, 32, 32), (1, 3, 32, 32)],
    "cpu": [(64, 3, 32, 32), (1, 3, 32, 32)],
    "tiny": [(9, 3, 5, 7)],
}[SCALE]
ROTATED = 20  # sets of inputs; two if all of them together are larger than ENOUGH_BYTES
ENOUGH_BYTES = 1 << 28
JUDGED = 8  # samples of a batch
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "uint8": torch.uint8}
STEP = [
    *(("fastddpm step", dtype) for dtype in ("bf16", "fp16", "fp32")),
    *(("reference step", dtype) for dtype in ("bf16", "fp32")),
    ("diffusers step", "fp32"),
]
GUIDED = [(f"{who} guided_step", dtype) for who in ("fastddpm", "reference") for dtype in ("bf16", "fp32")]
NOISING = [
    *(("fastddpm noising", dtype) for dtype in ("uint8", "fp32")),
    *(("reference noising", dtype) for dtype in ("uint8", "fp32")),
    ("diffusers noising", "fp32"),
]
LOSS = [(f"{who} eps_loss", dtype) for who in ("fastddpm", "reference") for dtype in ("bf16", "fp32")]
TRAINING = [(f"{who} noising+eps_loss", dtype) for who in ("fastddpm", "reference") for dtype in ("bf16", "fp32")]


class Problem(NamedTuple):
    """The inputs of a kernel, and a call that has passed the gate.

    Attributes:
        call: runs the kernel.
        bytes_moved: the least bytes that it can move.
        flops: those of the written formula, without the noise, whose cost depends on the generator.
        errors: those that the gate measured.
        per_element: the bytes that it actually moves per element, from the kernels' docstrings or counted in eager
            torch; None if that does not matter.
    """

    call: Call
    bytes_moved: int
    flops: int
    errors: dict[str, Any]
    per_element: float | None = None


# A step in the middle of the schedule, in float32; dtype: the network's


def step_problem(shape: tuple[int, ...], dtype: torch.dtype, who: str = "fastddpm") -> Problem:
    x, m = (layout.empty(shape[0], shape[1:], dtype=d, device=DEVICE).normal_() for d in (torch.float32, dtype))
    fewest = 2 * x.nbytes + m.nbytes + (0 if dtype == torch.float32 else m.nbytes)
    call, errors = {"fastddpm": _our_step, "reference": _reference_step, "diffusers": _diffusers_step}[who](x, m)
    return Problem(call, fewest, 12 * x.numel(), errors)


def _our_step(x: Tensor, m: Tensor) -> tuple[Call, dict[str, Any]]:
    table, address = SCHEDULE.table().to(DEVICE), noise.address(0, len(x), DEVICE)
    pos = torch.full(x.shape[:1], MIDDLE, dtype=torch.int32, device=DEVICE)
    z = noise.normal(address[:JUDGED], x.shape[1:], stream=noise.STEP, t=MIDDLE)
    want = update(x[:JUDGED], m[:JUDGED], table.rows[MIDDLE], z, clip=table.clip)
    out = None if m.dtype == torch.float32 else torch.empty_like(m)
    call = partial(ops.step, x, m, table, pos, address, out=out, bad=torch.full_like(pos, -1))
    call()
    errors = same_bits(x[:JUDGED], want)
    return call, errors if out is None else same_bits(out, x.to(m.dtype))


def _reference_step(x: Tensor, m: Tensor) -> tuple[Call, dict[str, Any]]:
    """With noise from torch's generator, and the result's copy for the network."""
    table = SCHEDULE.table().to(DEVICE)
    row, clip = table.rows[MIDDLE], table.clip

    def call() -> Tensor:
        y = update(x, m, row, torch.randn_like(x), clip=clip)
        return y if m.dtype == torch.float32 else y.to(m.dtype)

    few = x[:JUDGED], m[:JUDGED]
    want = partial(update, row=row, z=None, clip=clip)
    return call, judged(want(*few), want(*few), want(*(part.double() for part in few)))


def _diffusers_step(x: Tensor, m: Tensor) -> tuple[Call, dict[str, Any]]:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()
    scheduler.set_timesteps(T)
    t, generator = scheduler.timesteps[T - 1 - MIDDLE], torch.Generator(DEVICE)
    step = partial(scheduler.step, m, t, x, return_dict=False)
    z = torch.randn(x.shape, generator=generator.manual_seed(0), device=DEVICE)
    theirs = step(generator=generator.manual_seed(0))[0]
    x, m, z = (part[:JUDGED] for part in (x, m, z))
    plain, ref = (_textbook_step(x.to(dtype), m.to(dtype), z.to(dtype)) for dtype in (torch.float32, torch.float64))
    return step, judged(theirs[:JUDGED], plain, ref)


def _textbook_step(x: Tensor, m: Tensor, z: Tensor) -> Tensor:
    """Return the paper's clipped step (eq. 6, 7, 15); coefficients in the dtype of x, from alphas_cumprod alone."""
    diffusion = Diffusion(linear_betas(T))
    abar = (1 - linear_betas(T).float().to(x.dtype)).cumprod(0)
    diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev = abar, torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    diffusion.alphas = abar / diffusion.alphas_cumprod_prev
    diffusion.betas = 1 - diffusion.alphas
    diffusion.posterior_var = (1 - diffusion.alphas_cumprod_prev) / (1 - abar) * diffusion.betas
    return diffusion.step(x, m, MIDDLE, z, clip=1)


def guided_step_problem(shape: tuple[int, ...], dtype: torch.dtype, who: str = "fastddpm") -> Problem:
    """The same with classifier-free guidance: the network's outputs with and without the condition."""
    n, *sample = shape
    x = layout.empty(n, sample, dtype=torch.float32, device=DEVICE).normal_()
    m = layout.empty(2 * n, sample, dtype=dtype, device=DEVICE).normal_()
    table, address = SCHEDULE.table().to(DEVICE), noise.address(0, n, DEVICE)
    pos = torch.full((n,), MIDDLE, dtype=torch.int32, device=DEVICE)
    guidance = torch.full((n,), 2.0, dtype=torch.float32, device=DEVICE)
    row, few = table.rows[MIDDLE], slice(min(n, JUDGED))
    of_mean = guided(m[:n][few].float(), m[n:][few].float(), guidance[0])
    z = noise.normal(address[few], sample, stream=noise.STEP, t=MIDDLE)
    want = update(x[few], of_mean, row, z, clip=table.clip)
    bytes_moved, flops = 2 * x.nbytes + m.nbytes, 15 * x.numel()
    if who == "fastddpm":
        call: Call = partial(ops.conditional_step, x, m, table, pos, address, guidance=guidance)
        call()
        return Problem(call, bytes_moved, flops, same_bits(x[few], want))

    def reference() -> Tensor:
        both = guided(m[:n].float(), m[n:].float(), guidance[0])
        return update(x, both, row, torch.randn_like(x), clip=table.clip)

    exact = update(x[few].double(), of_mean.double(), row.double(), z.double(), clip=table.clip)
    return Problem(reference, bytes_moved, flops, judged(want, want, exact))


# Noising to bfloat16; dtype: that of the data


def noising_problem(shape: tuple[int, ...], dtype: torch.dtype, who: str = "fastddpm") -> Problem:
    x_0 = layout.empty(shape[0], shape[1:], dtype=dtype, device=DEVICE).random_(256)
    t = torch.randint(T, shape[:1], device=DEVICE)
    noised: dict[str, Callable[..., Any]] = {
        "fastddpm": _our_noising, "reference": _reference_noising, "diffusers": _diffusers_noising,
    }  # fmt: skip
    call, errors = noised[who](x_0, t)
    flops = (5 if dtype == torch.uint8 else 3) * x_0.numel()
    return Problem(call, x_0.nbytes + 2 * x_0.numel(), flops, errors)


def _our_noising(x_0: Tensor, t: Tensor) -> tuple[Call, dict[str, Any]]:
    table, address = SCHEDULE.noising_table().to(DEVICE), noise.address(0, len(x_0), DEVICE)
    eps = noise.normal(address[:JUDGED], x_0.shape[1:], stream=noise.TRAIN, t=0)
    call = partial(ops.noising, x_0, t, address, table, dtype=torch.bfloat16)
    want = add_noise(_data(x_0[:JUDGED]), eps, table[t[:JUDGED]]).bfloat16()
    return call, same_bits(call()[:JUDGED], want)


def _reference_noising(x_0: Tensor, t: Tensor) -> tuple[Call, dict[str, Any]]:
    table = SCHEDULE.noising_table().to(DEVICE)

    def call() -> Tensor:
        value = _data(x_0)
        return add_noise(value, torch.randn_like(value), table[t]).bfloat16()

    return call, _judged_noising(lambda x, eps, t: add_noise(x, eps, table[t]), x_0, t)


def _diffusers_noising(x_0: Tensor, t: Tensor) -> tuple[Call, dict[str, Any]]:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(DEVICE)

    def call() -> Tensor:
        value = _data(x_0)
        return scheduler.add_noise(value, torch.randn_like(value), t).bfloat16()

    return call, _judged_noising(scheduler.add_noise, x_0, t)


def _judged_noising(noised: Callable[[Tensor, Tensor, Tensor], Tensor], x_0: Tensor, t: Tensor) -> dict[str, Any]:
    """Judge in bfloat16, with a given eps."""
    value, t, table = _data(x_0[:JUDGED]), t[:JUDGED], SCHEDULE.noising_table().to(DEVICE)
    eps = torch.randn_like(value)
    ref = add_noise(value.double(), eps.double(), table[t].double())
    return judged(noised(value, eps, t).bfloat16(), add_noise(value, eps, table[t]).bfloat16(), ref)


# The loss, |m - eps|^2, and its gradient; dtype: the network's, with uint8 data


def loss_problem(shape: tuple[int, ...], dtype: torch.dtype, who: str = "fastddpm") -> Problem:
    """The reference gets eps as an input; ours computes it again."""
    return _loss_problem(shape, dtype, who, noised=False)


def training_problem(shape: tuple[int, ...], dtype: torch.dtype, who: str = "fastddpm") -> Problem:
    """Noising and loss: all of a training step except the network and its optimizer."""
    return _loss_problem(shape, dtype, who, noised=True)


def _loss_problem(shape: tuple[int, ...], dtype: torch.dtype, who: str, *, noised: bool) -> Problem:
    x_0 = layout.empty(shape[0], shape[1:], dtype=torch.uint8, device=DEVICE).random_(256)
    m = layout.empty(shape[0], shape[1:], dtype=dtype, device=DEVICE).normal_().requires_grad_()
    t = torch.randint(T, shape[:1], device=DEVICE)
    fewest = 3 * m.nbytes + noised * (x_0.nbytes + m.nbytes)  # forward, backward; x_0 and x_t
    call, errors = {"fastddpm": _our_loss, "reference": _reference_loss}[who](m, x_0, t, noised)
    if who == "fastddpm":
        moved = fewest
    else:
        with Bytes() as count:
            call()
        moved = count.moved
    return Problem(call, fewest, (5 + 5 * noised) * m.numel(), errors, moved / m.numel())


def _our_loss(m: Tensor, x_0: Tensor, t: Tensor, noised: bool) -> tuple[Call, dict[str, Any]]:
    table, address = SCHEDULE.noising_table().to(DEVICE), noise.address(0, len(x_0), DEVICE)
    mean = torch.full(t.shape, 1 / m.numel(), device=DEVICE)  # the gradient of the mean over all elements

    def call() -> tuple[Tensor, Tensor, Tensor | None]:
        x_t = ops.noising(x_0, t, address, table, dtype=m.dtype) if noised else None
        loss = ops.eps_loss(m, x_0, t, address, table)
        return loss.detach(), torch.autograd.grad(loss, m, mean)[0], x_t

    eps = noise.normal(address[:JUDGED], m.shape[1:], stream=noise.TRAIN, t=0)
    few = m.detach()[:JUDGED]
    wanted = [squared_error(few, eps), (2 * mean[0] * (few.float() - eps)).to(m.dtype)]
    if noised:
        wanted.append(add_noise(_data(x_0[:JUDGED]), eps, table[t[:JUDGED]]).to(m.dtype))
    for ours, want in zip(call(), wanted, strict=False):
        errors = same_bits(ours[:JUDGED], want)
    return call, errors


def _reference_loss(m: Tensor, x_0: Tensor, t: Tensor, noised: bool) -> tuple[Call, dict[str, Any]]:
    """As written in eager torch, with noise from its generator."""
    table, stored = SCHEDULE.noising_table().to(DEVICE), torch.randn_like(m, dtype=torch.float32)

    def call() -> tuple[Tensor, Tensor, Tensor | None]:
        eps, x_t = stored, None
        if noised:
            value = _data(x_0)
            eps = torch.randn_like(value)
            x_t = add_noise(value, eps, table[t]).to(m.dtype)
        loss = F.mse_loss(m.float(), eps)
        return loss.detach(), torch.autograd.grad(loss, m)[0], x_t

    few, eps = m.detach()[:JUDGED], stored[:JUDGED]
    plain, exact = ((2 / m.numel() * (few.to(d) - eps.to(d))) for d in (torch.float32, torch.float64))
    loss = F.mse_loss(m.float(), stored)
    return call, judged(torch.autograd.grad(loss, m)[0][:JUDGED], plain.to(m.dtype), exact)


def _data(x_0: Tensor) -> Tensor:
    """Return uint8 images in [-1, 1]."""
    return (x_0.float() - 127.5) * (2 / 255) if x_0.dtype == torch.uint8 else x_0.float()


# The cases


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), STEP)
def test_step(measure, shape, name, dtype):
    timed(measure, step_problem, shape, name, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), GUIDED)
def test_guided_step(measure, shape, name, dtype):
    timed(measure, guided_step_problem, shape, name, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), NOISING)
def test_noising(measure, shape, name, dtype):
    timed(measure, noising_problem, shape, name, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), LOSS)
def test_eps_loss(measure, shape, name, dtype):
    timed(measure, loss_problem, shape, name, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), TRAINING)
def test_noising_and_loss(measure, shape, name, dtype):
    """Part of a training step. The target is a third of the bytes that eager torch moves."""
    timed(measure, training_problem, shape, name, dtype)


@pytest.mark.parametrize("shape", SHAPES[-2:], ids=str)
@pytest.mark.parametrize("name", ["fastddpm step", "fastddpm noising"])
def test_hot(measure, shape, name):
    """As in sampling, where the network has just written m."""
    problem = step_problem if "step" in name else noising_problem
    found = problem(shape, torch.bfloat16 if "step" in name else torch.uint8)
    measure(*repeated(found.call), bytes_moved=found.bytes_moved, flops=found.flops, errors=found.errors)


def timed(
    measure: Callable[..., float], problem: Callable[..., Problem], shape: tuple[int, ...], name: str, dtype: str
):
    who, kernel = name.split()
    if who == "diffusers":
        contender("diffusers eager fp32")
    first = problem(shape, PRECISIONS[dtype], who)
    sets = 2 if first.bytes_moved * ROTATED > ENOUGH_BYTES else ROTATED
    calls = [first.call, *(problem(shape, PRECISIONS[dtype], who).call for _ in range(sets - 1))]
    captured = who != "diffusers"  # diffusers' scheduler is called from Python in practice
    run, n = rotated(calls, captured=captured)
    group = f"{kernel}, {' x '.join(map(str, shape))}, {dtype}"
    facts: dict[str, Any] = {"captured": captured and DEVICE.type == "cuda"}
    if first.per_element is not None:
        facts["bytes_per_element"] = first.per_element
    measure(
        run,
        n,
        group=group,
        contender=who,
        bytes_moved=first.bytes_moved,
        flops=first.flops,
        cold=True,
        errors=first.errors,
        facts=facts,
    )
    if first.per_element is not None:
        by = " by the kernels of a GPU" if who == "fastddpm" else ""
        say(f"{'':<72} {first.per_element:>10.1f} bytes moved per element{by}")
