"""The measuring stages of a GPU check; bench.gpu_check runs each in its own process.

As in all benchmarks, a network is compared with the reference before it is timed. Each result is written as soon as it
is known. A result that fails is written with its reason, and the stage continues with the next.
"""

import faulthandler
import math
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench import kinds, machine, policy, records, rounds
from bench.contenders import SCHEDULE, Contender, T, judge_a_step, loop, runner_of
from bench.gpu_results import DEVICE_VARIABLE, LIMIT_VARIABLE, SANITIZER_VARIABLE, write_result
from bench.layouts import flops, moved, network
from bench.machine import DEVICE, SCALE, Call
from bench.watch import Watch, gpu_uuid
from fastddpm import Sampler, Schedule, ops
from fastddpm.core import layout, noise
from fastddpm.networks import unet2d
from fastddpm.ops.parallel_steps import commit, draft, first_difference
from fastddpm.sampling.arguments import sample_shape
from fastddpm.sampling.capture import capture
from fastddpm.sampling.runner import Runner

MODEL, DTYPE = "cifar10-32", torch.bfloat16
BATCHES = {"cuda": (1, 64, 256, 16, 512), "cpu": (1, 16), "tiny": (2,)}[SCALE]  # the most important first
PROFILED = {"cuda": (1, 64, 256), "cpu": (1,), "tiny": (2,)}[SCALE]
RIVALS = {  # of the stage "diffusers": the contenders and the batch sizes
    "cuda": (
        ("fastddpm graph bf16", "diffusers eager fp32", "diffusers eager bf16", "diffusers compiled bf16"),
        (1, 64),
    ),
    "cpu": (("fastddpm eager bf16", "diffusers eager fp32", "diffusers eager bf16"), (1,)),
    "tiny": (("fastddpm eager fp32", "diffusers eager fp32"), (2,)),
}[SCALE]
ROUNDS, ROUND_S = (3, 0.001) if SCALE == "tiny" else (10, 0.1)
ON_GPU = DEVICE.type == "cuda"
TIMED_ENGINES = ("graph", "eager") if ON_GPU else ("eager",)
EMPTY_KERNELS = 200
stage_hash, failures = "", 0  # of this process's stage: its source hash, and how many results failed


@contextmanager
def result(name: str) -> Iterator[dict[str, Any]]:
    """Yield the fields of a result for the block to fill in, then write it; an exception makes it a failed result."""
    global failures
    fields: dict[str, Any] = {"hash": stage_hash}
    try:
        with Watch(gpu_uuid(DEVICE)) as watch:
            yield fields
        write_result(name, **fields, watch=watch.facts, invalid=watch.invalid)
    except Exception as error:
        failures += 1
        print(f"-- {name}", flush=True)
        traceback.print_exc()
        write_result(name, "failed", f"{type(error).__name__}: {error}".partition("\n")[0])
    torch.cuda.empty_cache()


def timing_fields(run: Call, n: int, before: Call = lambda: None) -> dict[str, Any]:
    """Time run(), which makes n calls, in rounds; before() runs untimed before each. Returns: the record's fields."""
    samples = []
    for _ in range(ROUNDS):
        before()
        machine.wait()
        samples.append(machine.timed(run) / n)
    return {"samples_s": samples, "calls": n, "clock": machine.CLOCK, "cache": "hot"}


# Smoke test: graph replays and eager steps have equal bits


def smoke() -> None:
    fast = "graph" if ON_GPU else "auto"
    with result("machine") as fields:
        fields["facts"] = machine.description() | {"scale": SCALE}
    for precision in ("bf16", "fp32"):
        with result(f"{fast} equals eager, {precision}") as fields:
            one, other = (
                Sampler(network(MODEL), device=DEVICE, precision=precision, engine=engine).sample(
                    2, steps=20, progress=False
                )
                for engine in (fast, "eager")
            )
            fields["errors"] = machine.same_bits(one, other)


# Steps


def steps() -> None:
    for cudnn_benchmark in (False, True):  # True last: cuDNN then takes seconds per batch size to time its kernels
        for batch in BATCHES:
            for engine in TIMED_ENGINES:
                with result(f"batch {batch}, {engine}{', cudnn.benchmark' * cudnn_benchmark}") as fields:
                    torch.backends.cudnn.benchmark = cudnn_benchmark
                    fields["params"] = {"batch": batch, "engine": engine, "cudnn_benchmark": cudnn_benchmark}
                    with runner_of(MODEL, batch, who := Contender("fastddpm", engine, "bf16")) as runner:
                        fields |= time_steps(runner, who)
                    fields["group"] += ", cudnn.benchmark" * cudnn_benchmark
    torch.backends.cudnn.benchmark = False


def time_steps(runner: Runner, who: Contender) -> dict[str, Any]:
    errors, batch = judge_a_step(runner, MODEL, who), len(runner.x)
    start_at_the_first_step(runner)
    seconds = machine.timed(partial(take_steps, runner, 3)) / 3
    n = min(T // 2, max(1, math.ceil(ROUND_S / seconds)))
    return timing_fields(partial(take_steps, runner, n), n, partial(start_at_the_first_step, runner)) | {
        "group": f"steps, {MODEL}, batch {batch}",
        "contender": " ".join(who),
        "bytes": moved(MODEL, batch, "bf16"),
        "flops": batch * flops(MODEL),
        "images": batch / T,
        "precision": "bf16",
        "errors": errors,
    }


def start_at_the_first_step(runner: Runner) -> None:
    """Load the full schedule, without clipping: like `judge_a_step`, so that its graph is reused."""
    runner.load(Schedule(clip_sample=False).table(), noise.address(0, len(runner.x)))
    runner.start()


def take_steps(runner: Runner, n: int) -> None:
    for _ in range(n):
        runner.step()


def kernels() -> None:
    """Profile a step at each batch size in its own process: CUPTI 13.0 may lose records after a process's first."""
    global failures
    for batch in PROFILED:
        code = f"import sys; from bench.gpu_stages import main; sys.exit(main('profile', {batch}))"
        failures += subprocess.run([sys.executable, "-c", code], check=False).returncode != 0


def profile(batch: int) -> None:
    who = Contender("fastddpm", TIMED_ENGINES[0], "bf16")
    with result(f"batch {batch}, {who.engine}") as fields, runner_of(MODEL, batch, who) as runner:
        fields["facts"] = profile_step(runner)


def profile_step(runner: Runner) -> dict[str, Any]:
    """Profile a step: launches and seconds by kind of kernel, microseconds by kernel name."""
    n = 2 if SCALE == "tiny" else 20
    start_at_the_first_step(runner)
    launches, kinds_s, names_us = Counter(), Counter(), Counter()
    for name, kind, microseconds in kinds.events(partial(take_steps, runner, n)):
        launches[kind] += 1
        kinds_s[kind] += microseconds / n / 1e6
        names_us[name] += microseconds / n
    if not launches:
        raise RuntimeError("the profiler saw no kernel")
    launches = {kind: count / n for kind, count in launches.items()}  # a fraction means that some were lost
    return {"launches": launches, "kinds_s": dict(kinds_s), "names_us": dict(names_us.most_common(60))}


# The hardware


def hardware() -> None:
    with result("ceilings") as fields:
        fields["facts"] = {"ceilings": machine.ceilings()}
    with result(f"{EMPTY_KERNELS} empty kernels") as fields:
        x = torch.zeros(1, device=DEVICE)
        empty = partial(torch.cuda._sleep, 0) if ON_GPU else partial(x.add_, 1)
        run = partial(machine.call_each, [empty] * EMPTY_KERNELS)
        run()
        fields |= timing_fields(capture(run, DEVICE).replay if ON_GPU else run, EMPTY_KERNELS)
    for batch in PROFILED:
        for (shape, conv), count in convolutions(batch).items():
            kernel, stride, side = conv.kernel_size[0], conv.stride[0], shape[2]
            channels = f"{conv.in_channels} to {conv.out_channels}"
            shapes = f"{kernel} x {kernel}, stride {stride}, {channels}, {side} x {side} pixels"
            name = f"batch {batch}, {count} x conv {shapes}"
            with result(name) as fields:
                x = layout.empty(shape[0], shape[1:], dtype=DTYPE, device=DEVICE).normal_()
                y = conv(x)
                run, n = machine.repeated(partial(conv, x), ROUND_S / 10)
                fields |= timing_fields(run, n)
                fields |= {"bytes": x.nbytes + y.nbytes + conv.weight.nbytes, "precision": "bf16"}
                fields["flops"] = 2 * y.numel() * conv.in_channels * kernel**2


def convolutions(batch: int) -> Counter[tuple[tuple[int, ...], nn.Conv2d]]:
    """Count the network's convolutions by shape. Returns: {(input shape, first such layer): how many there are}."""
    net, found, representative = network(MODEL).for_inference(DTYPE, DEVICE), Counter(), {}

    def count_conv(conv: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
        shape = tuple(args[0].shape)
        key = shape, conv.out_channels, conv.kernel_size, conv.stride, conv.bias is None
        found[representative.setdefault(key, (shape, conv))] += 1

    hooks = [m.register_forward_pre_hook(count_conv) for m in net.modules() if isinstance(m, nn.Conv2d)]
    x = torch.zeros(batch, *sample_shape(net), dtype=DTYPE, device=DEVICE)
    with torch.no_grad():
        net.denoise(layout.channels_last(x), net.time_rows(torch.zeros(1, dtype=torch.int64, device=DEVICE)))
    for hook in hooks:
        hook.remove()
    return found


# Upsampling: interpolated or polyphase


def upsampling() -> None:
    """Time interpolated and polyphase upsampling alternately; the result decides `POLYPHASE_DEVICES`."""
    who = Contender("fastddpm", TIMED_ENGINES[0], "bf16")
    for batch in PROFILED:
        with result(f"batch {batch}, both forms"), ExitStack() as stack:
            runners = {}
            for name, devices in (("interpolated", ()), ("polyphase", ("cpu", "cuda"))):
                with patch.object(unet2d, "POLYPHASE_DEVICES", devices):
                    runners[name] = stack.enter_context(runner_of(MODEL, batch, who))
            turns = [*runners, *(f"{name}, repeated" for name in reversed(runners))]
            for turn in turns:
                with result(f"batch {batch}, {turn}") as fields:
                    fields |= time_steps(runners[turn.removesuffix(", repeated")], who)
                    fields |= {"group": f"upsampling, {MODEL}, batch {batch}", "contender": turn}


# One sample, parallel in time


def parallel() -> None:
    for mode, precision, window in rounds.CASES:
        with result(f"one sample, {mode} {precision}{f', window {window}' if window else ''}") as fields:
            sampler = rounds.sampler(precision)
            fields["errors"] = rounds.judge(sampler, mode, window)
            fields["facts"] = rounds.facts(sampler, mode, window)
            call = partial(rounds.draw, sampler, mode, window)
            fields["samples_s"] = [machine.timed(call) for _ in range(3)]
            fields |= {
                "calls": 1,
                "clock": machine.CLOCK,
                "cache": "hot",
                "group": "one sample",
                "precision": precision,
            }


# A robot's policy


def robot() -> None:
    for name in policy.CONTENDERS:
        if name.startswith("diffusers") and not find_spec("diffusers"):
            write_result(name, "skipped", "diffusers is not installed")
            continue
        with result(name) as fields:
            run, fields["errors"] = policy.action(name)
            run()
            fields |= timing_fields(run, policy.T) | {
                "contender": name,
                "group": "sampling, policy, batch 1",
                "precision": name.split()[2],
            }


# diffusers


def diffusers() -> None:
    if not find_spec("diffusers"):
        return write_result("diffusers", "skipped", "diffusers is not installed")
    names, batches = RIVALS
    for name in names:  # compiled ones come last
        for batch in batches:
            who = Contender(*name.split())
            with result(f"batch {batch}, {name}") as fields:
                n = {"cuda": 100, "cpu": 5, "tiny": 2}[SCALE]
                with loop(MODEL, batch, n, who) as ready:
                    fields |= timing_fields(ready.run, n) | {
                        "errors": ready.errors,
                        "facts": {"prepare_s": ready.seconds},
                    }
                fields |= {"group": f"steps, {MODEL}, batch {batch}", "contender": name, "images": batch / T}
                fields |= {"flops": batch * flops(MODEL), "precision": who.ceiling}
    return None


# Every kernel at odd shapes, for compute-sanitizer


def memcheck() -> None:
    if not os.environ.get(SANITIZER_VARIABLE):
        reason = "compute-sanitizer was not found, so memory accesses were not checked"
        write_result("compute-sanitizer", "skipped", reason)
    for name, call in {**KERNEL_CALLS, **{f"{name}, one pixel": call for name, call in KERNEL_CALLS.items()}}.items():
        with result(name):
            call((1, 4, 1, 1) if "one pixel" in name else (3, 20, 7, 11))
            machine.wait()


def _random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return layout.empty(shape[0], shape[1:], dtype=dtype, device=DEVICE).normal_()


def _step(shape: tuple[int, ...]) -> None:
    n, table = shape[0], SCHEDULE.table().to(DEVICE)
    pos, bad = (torch.full((n,), value, dtype=torch.int32, device=DEVICE) for value in (999, -1))
    ops.step(_random(shape), _random(shape, DTYPE), table, pos, noise.address(0, n, DEVICE), out_dtype=DTYPE, bad=bad)


def _predict_step(shape: tuple[int, ...]) -> None:
    rows = torch.ones(21, 8, device=DEVICE)
    ops.predict_step(_random(shape), _random(shape), rows, 5, clip=1.0, address=noise.address(0, shape[0], DEVICE))


def _noising_arguments(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x_0 = layout.empty(shape[0], shape[1:], dtype=torch.uint8, device=DEVICE).random_(256)
    return x_0, torch.arange(shape[0], device=DEVICE), noise.address(0, shape[0], DEVICE)


def _noising(shape: tuple[int, ...]) -> None:
    ops.noising(*_noising_arguments(shape), SCHEDULE.noising_table().to(DEVICE), dtype=DTYPE)


def _eps_loss(shape: tuple[int, ...]) -> None:
    m = _random(shape, DTYPE).requires_grad_()
    ops.eps_loss(
        m, *_noising_arguments(shape), SCHEDULE.noising_table().to(DEVICE), predicts="v_prediction"
    ).sum().backward()


def _x_0_error(shape: tuple[int, ...]) -> None:
    table = torch.ones(T, 7, device=DEVICE)
    ops.x_0_error(_random(shape, DTYPE), *_noising_arguments(shape), table)


def _group_norm(shape: tuple[int, ...]) -> None:
    """Covers both plans: a program that holds its groups in registers, and several programs that share a group."""
    for n, c, *pixels in (shape, (1, 4, 70, 61)):
        x, skip = _random((n, c, *pixels), DTYPE), _random((n, c, *pixels), DTYPE)
        weight, bias, add = (torch.ones(shape, device=DEVICE) for shape in ((2 * c,), (2 * c,), (n, 2 * c)))
        ops.group_norm(x, weight, bias, 2, eps=1e-5, skip=skip, add=add, act="silu")


def _residual(shape: tuple[int, ...]) -> None:
    ops.residual(_random(shape, DTYPE), _random(shape, DTYPE), torch.ones(shape[1], device=DEVICE))


def _interleave(shape: tuple[int, ...]) -> None:
    n, c, height, width = shape
    ops.interleave(_random((n, c, height + 1, width + 1), DTYPE), torch.ones(c // 4, device=DEVICE))


def _chains(shape: tuple[int, ...]) -> None:
    """One round: draft, compare, commit."""
    n, window, table = shape[0], 3, SCHEDULE.table().to(DEVICE)
    slots, address = (n * window, *shape[1:]), noise.address(0, n, DEVICE)
    x, states, m, copy = _random(shape), _random(slots), _random(slots), _random(slots, DTYPE)
    pos, seen = (torch.full((n,), value, dtype=torch.int32, device=DEVICE) for value in (999, 998))
    draft(states, x, m, table, pos, seen, address, ahead=window, copy=copy)
    reached = first_difference(x, states, m, table, pos, address, ahead=window)
    commit(x, m, table, pos, reached, address, ahead=window, bad=torch.full_like(pos, -1))


KERNEL_CALLS: dict[str, Callable[[tuple[int, ...]], None]] = {
    "step": _step, "predict_step": _predict_step, "noising": _noising, "eps_loss": _eps_loss, "x_0_error": _x_0_error,
    "group_norm": _group_norm, "residual": _residual, "interleave": _interleave, "chains": _chains,
}  # fmt: skip
STAGES: dict[str, Callable[[], None]] = {
    "smoke": smoke, "steps": steps, "kernels": kernels, "hardware": hardware, "upsampling": upsampling,
    "parallel": parallel, "robot": robot, "diffusers": diffusers, "memcheck": memcheck,
}  # fmt: skip


def main(name: str, *arguments: int) -> int:
    """Run a stage, or the profile of a batch size. Returns: the exit status of its process."""
    global stage_hash
    wanted = os.environ.get(DEVICE_VARIABLE, DEVICE.type)
    if DEVICE.type != wanted:
        print("torch found no GPU; pass --device cpu to run without one")
        return 2
    if limit := os.environ.get(LIMIT_VARIABLE):
        faulthandler.dump_traceback_later(max(1, float(limit) - 5))  # where it hangs, before it is killed
    stage = profile if arguments else STAGES[name]
    stage_hash = records.source_hash(stage)
    stage(*arguments)
    print(f"failed results: {failures}")
    return 1 if failures else 0
