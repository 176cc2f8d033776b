"""Where the time of a step goes: the kernels of a profile, sorted by name into a few kinds."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from bench.machine import DEVICE, Call, wait
from fastddpm.kernels.cpu.program import Program

OTHER = "copies, other"
MATMUL = "convolution, matmul"
# The first pattern that matches the name of a kernel or an operator decides. Inductor names a pointwise kernel after
# all operations fused into it, such as a convolution, so its pattern comes before that of matrix products.
PATTERNS = [
    (MATMUL, r"^triton_tem_"),
    ("attention", r"flash|fmha|sdpa|softmax|attention"),
    ("norm, SiLU", r"group_?norm|silu|RowwiseMoments|ComputeFusedParams|^(held|statistics|apply)_kernel"),
    ("update", r"(step|draft|first_difference|commit)_kernel|fastddpm::step"),
    (OTHER, r"^triton_(poi|red|per)_|nchwToNhwc|nhwcToNchw|^Mem(cpy|set)|copy|CatArray|residual|interleave"),
    (MATMUL, r"conv|winograd|gem[mv]|xmma|cutlass|nvjet|splitK|matmul|linear|:(add|b|badd)?mm"),
]


def kind(name: str) -> str | None:
    """Return the kind of a kernel or an operator; None if the name does not show it."""
    return next((kind for kind, pattern in PATTERNS if re.search(pattern, name, re.IGNORECASE)), None)


def microseconds(run: Call) -> dict[str, Counter[str]]:
    """Return {kind: {name: microseconds}} of the kernels of a GPU, or operators of a CPU, that run() executes."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind, _ in PATTERNS}
    for name, kind, time in events(run):
        found[kind][name] += time
    return found


def events(run: Call) -> list[tuple[str, str, float]]:
    """Return (name, kind, microseconds) of what run() executes: GPU kernels, or operators and C++ kernels of a CPU."""
    on_gpu = DEVICE.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with _programs_call_by_call() as calls, profile(activities=[activity]) as profiled:
        run()
        wait()
    return [
        (event.name, _kind_of(event), event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total)
        for event in profiled.events()
        if (event.device_type != torch.autograd.DeviceType.CPU) == on_gpu
    ] + [(kernel, kind(kernel) or OTHER, 1e6 * seconds) for kernel, seconds in calls]


@contextmanager
def _programs_call_by_call() -> Iterator[list[tuple[str, float]]]:
    """In this context programs of C++ kernels, which torch does not see, run call by call.

    Yields: a list, to which the (kernel, seconds) of each call are added.
    """
    calls: list[tuple[str, float]] = []
    with patch.object(Program, "run", lambda program, *pointers: calls.extend(program.seconds(*pointers))):
        yield calls


def _kind_of(event: Any) -> str:
    """Return its own kind, or that of the nearest operator that called it."""
    while event is not None:
        if found := kind(event.name):
            return found
        event = event.cpu_parent
    return OTHER
