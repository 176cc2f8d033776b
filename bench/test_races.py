"""Alternatives side by side on the shapes of the networks: pytest bench/test_races.py

All run hot, many times over the same tensors in one captured graph: in a network, the previous kernel has just written
the activations, which are in the cache as far as they fit.
"""

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.layouts import Norm, norms
from bench.machine import DEVICE, SCALE, Call, judged, race, repeated, right, say
from bench.test_kernels import noising_problem, step_problem
from fastddpm import ops
from fastddpm.core import layout

DTYPE = torch.bfloat16
BACKENDS = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
NETWORKS = {
    "cuda": [("cifar10-32", 64), ("cifar10-32", 1), ("celebahq-256", 16), ("celebahq-256", 1)],
    "cpu": [],  # on a CPU the network uses torch's own
    "tiny": [("cifar10-32", 2)],
}[SCALE]
ATTENTION = {  # batch, tokens, heads, head dim
    "cuda": [(n, tokens, width // dim, dim) for tokens in (256, 1024) for n in (64, 1)
             for width, dim in ((256, 256), (512, 512), (256, 8), (256, 64))],
    "cpu": [(1, 256, 1, 256), (1, 256, 32, 8)],
    "tiny": [(2, 16, 1, 32)],
}[SCALE]  # fmt: skip
COMPILED = ("plans", "inductor")
LAUNCHES = [(512, 1), (512, 2), (1024, 1), (1024, 2), (1024, 4), (2048, 2), (2048, 4), (4096, 4), (4096, 8)]


def show(what: str, times: dict[str, float], bytes_moved: int = 0) -> None:
    """Print the four fastest, and the memory rate of the first."""
    best = sorted(times.items(), key=lambda item: item[1])[:4]
    rate = f" ({bytes_moved / best[0][1] / 1e9:.0f} GB/s)" if bytes_moved else ""
    say(f"    {what:<32} " + ", ".join(f"{who} {1e6 * time:.1f} us" for who, time in best) + rate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "heads", "dim"), ATTENTION)
def test_attention(measure, batch, tokens, heads, dim, dtype):
    """Self-attention in the middle of the U-Net: torch's choice, and every backend that accepts it."""
    qkv = torch.randn(batch, tokens, 3 * heads * dim, dtype=dtype, device=DEVICE).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (heads, dim)).transpose(1, 2) for part in qkv)  # as one product makes them
    attention = partial(F.scaled_dot_product_attention, q, k, v)

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return attention()

    def check(y: Tensor) -> dict[str, Any]:
        few = [part[:2] for part in (q, k, v)]  # the whole batch would be slow in float64
        return judged(y[:2], plain_attention(*few), plain_attention(*(part.double() for part in few)))

    contenders, wrong = right({backend.name: partial(by, backend) for backend in BACKENDS}, check)
    times = race(contenders)
    show(f"{batch} x {tokens} tokens, {heads} heads of {dim}", times)
    errors = check(attention())
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    operations = 4 * batch * heads * tokens**2 * dim
    facts = {"backends_s": times, "not_timed": wrong}
    moved = 4 * q.numel() * q.itemsize
    how = {"bytes_moved": moved, "flops": operations, "precision": precision, "errors": errors, "facts": facts}
    measure(*repeated(attention), **how)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


@pytest.mark.parametrize("kernel", ["step", "noising"])
def test_launches(measure, kernel):
    """The kernel's own block size and number of warps next to others, from 64 Mi elements on."""
    if ops.backend(DEVICE) != "triton":
        pytest.skip("the kernels run on a GPU")
    module = import_module(f"fastddpm.kernels.{kernel}")
    shape = {"cuda": (342, 3, 256, 256)}.get(SCALE, (2, 3, 32, 32))
    problem = partial(step_problem, shape, DTYPE) if kernel == "step" else partial(noising_problem, shape, torch.uint8)
    contenders = {}
    for block, warps in LAUNCHES:
        launched = patch.multiple(module, BLOCK=block, OPTIONS=module.OPTIONS | {"num_warps": warps})
        contenders[f"{block} by {warps} warps"] = launched(launched(problem)().call)
    times, own = race(contenders), problem()
    facts = {"launches_s": times}
    measure(*repeated(own.call), bytes_moved=own.bytes_moved, flops=own.flops, errors=own.errors, facts=facts)
    show(f"now {module.BLOCK} by {module.OPTIONS['num_warps']} warps", times, own.bytes_moved)


class NormProblem:
    """The inputs of a group norm, off-centre, and ways to compute it."""

    def __init__(self, norm: Norm, batch: int):
        self.norm = norm
        parts = [shape for shape in (norm.shape, norm.skip) if shape]
        self.x, self.skip = ([self._input(batch, shape) for shape in parts] + [None])[:2]
        channels = sum(shape[0] for shape in parts)
        self.weight, self.bias = torch.rand(channels, device=DEVICE) + 0.5, torch.randn(channels, device=DEVICE)
        self.add = torch.randn(batch, 2 * channels, device=DEVICE)[:, :channels] if norm.add else None
        self.flops = 10 * batch * channels * self.x.shape[2:].numel()  # of a textbook norm with SiLU
        self.bytes_moved = 2 * sum(part.nbytes for part in (self.x, self.skip) if part is not None)

    def ours(self) -> Tensor:
        norm = self.norm
        return ops.group_norm(
            self.x, self.weight, self.bias, norm.groups, eps=norm.eps, skip=self.skip, add=self.add, act=norm.act
        )

    def plain(self, dtype: torch.dtype = DTYPE, norm: Callable[..., Tensor] | None = None) -> Call:
        """Return a call of `plain_norm`, or of its compiled form, with all inputs in dtype."""
        inputs = self.x, self.skip, self.add, self.weight, self.bias
        cast = [None if tensor is None else tensor.to(dtype) for tensor in inputs]
        return partial(norm or plain_norm, *cast, self.norm.groups, self.norm.eps, self.norm.act)

    def check(self) -> Callable[[Tensor], dict[str, Any]]:
        """Return a check of a result: it errs at most twice as much as plain torch's."""
        return partial(judged, plain=self.plain()(), ref=self.plain(torch.float64)())

    @staticmethod
    def _input(batch: int, shape: tuple[int, ...]) -> Tensor:
        return layout.empty(batch, shape, dtype=DTYPE, device=DEVICE).normal_(1)


def plain_norm(x, skip, add, weight, bias, groups, eps, act):
    """Plain torch, channels-last in and out; compiled, it is Inductor's."""
    if skip is not None:
        x = torch.cat([x, skip], 1)
    if add is not None:
        x = x + add[:, :, None, None]
    y = F.group_norm(x, groups, weight, bias, eps)
    y = y if act is None else {"silu": F.silu, "mish": F.mish}[act](y)
    return y.contiguous(memory_format=torch.channels_last)  # a GPU's group norm returns NCHW


@pytest.mark.parametrize("rival", ["torch", *(pytest.param(who, marks=pytest.mark.compiled) for who in COMPILED)])
@pytest.mark.parametrize(("name", "batch"), NETWORKS)
def test_norms(measure, name, batch, rival):
    """All group norms of a forward pass as the product runs them, and each of them next to its rivals."""
    problems = {norm: NormProblem(norm, batch) for norm in norms(name)}
    if rival == "plans":
        if ops.backend(DEVICE) != "triton":
            pytest.skip("the kernels run on a GPU")
        compile_ahead(problems)
    totals, records, errors = Counter(), [], []
    for (norm, problem), count in zip(problems.items(), norms(name).values(), strict=True):
        rivals = plans(problem) if rival == "plans" else {rival: problem.plain()}
        if rival == "inductor":
            torch._dynamo.reset()  # torch stops compiling a function after eight versions
            rivals = {rival: problem.plain(norm=torch.compile(plain_norm, fullgraph=True, dynamic=False))}
        contenders, wrong = right({"ours": problem.ours} | rivals, problem.check())
        assert "ours" not in wrong, wrong["ours"]
        errors.append(problem.check()(problem.ours()))
        times = race(contenders)
        records.append({**norm._asdict(), "count": count, "times_s": times, "wrong": wrong})
        totals.update({who: count * times[who] for who in ("ours", rival) if who in times})
        totals["fastest of each"] += count * min(times.values(), default=math.nan)
        what = f"{list(norm.shape)}{f' + {norm.skip[0]}' if norm.skip else ''}{' + t' * norm.add} {norm.act or ''}"
        show(f"{count} x {what}", times, problem.bytes_moved)

    def forward():
        for norm, problem in problems.items():
            for _ in range(norms(name)[norm]):
                problem.ours()

    moved = sum(norms(name)[norm] * problem.bytes_moved for norm, problem in problems.items())
    worst = max(errors, key=lambda found: max(one["error"] / one["bound"] for one in found.values()))
    facts = {"shapes": records, "totals_s": dict(totals)}
    work = sum(norms(name)[norm] * problem.flops for norm, problem in problems.items())
    measure(*repeated(forward), bytes_moved=moved, flops=work, errors=worst, facts=facts)
    show("sums", totals, moved)
    for record in records:
        for who, why in record["wrong"].items():
            say(f"    {who} is wrong at {record['shape']} and was not timed: {why}")


def plans(problem: NormProblem) -> dict[str, Call]:
    """Return a call for every plan that the kernel could have chosen, except its own."""
    from fastddpm.kernels import group_norm

    n, channels = len(problem.x), len(problem.weight)
    shape = n, problem.x.shape[2:].numel(), channels, problem.norm.groups, problem.x.itemsize
    found = [plan for plan in group_norm.candidates(*shape) if plan != group_norm.plan(*shape)]
    return {str(tuple(plan)): patch.multiple(group_norm, plan=lambda *_, p=plan: p)(problem.ours) for plan in found}


def compile_ahead(problems: dict[Norm, NormProblem], processes: int | None = None) -> None:
    """Fill Triton's cache from all cores: a kernel takes a core one or two seconds, and there are hundreds."""
    tasks = [(norm, len(problem.x), who) for norm, problem in problems.items() for who in plans(problem)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(_run_plan, *zip(*tasks, strict=True)))


def _run_plan(norm: Norm, batch: int, who: str) -> None:
    call = plans(NormProblem(norm, batch))[who]
    with suppress(Exception):  # the race reports errors
        call()
