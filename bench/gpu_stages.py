"""The stages of a GPU check that measure, each in a process that bench.gpu_check starts.

Networks are judged before they are timed, as all benchmarks are. Each result is told as soon as it is known; one that
fails is told with its reason, and the next begins.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench import kinds, lines, machine, records
from bench.contenders import SCHEDULE, Contender, T, judge_a_step, loop, slots_of
from bench.layouts import flops, network
from bench.lines import tell
from bench.machine import DEVICE, SCALE, Call
from bench.test_sampling import moved
from bench.watch import Watch, gpu_uuid
from fastddpm import Sampler, Schedule, layout, noise, ops, unet
from fastddpm.capture import capture
from fastddpm.engine import Slots
from fastddpm.sampler import sample_shape

MODEL, DTYPE = "cifar10-32", torch.bfloat16
BATCHES = {"cuda": (1, 64, 256, 16, 512), "cpu": (1, 16), "tiny": (2,)}[SCALE]  # the most important first
PROFILED = {"cuda": (1, 64, 256), "cpu": (1,), "tiny": (2,)}[SCALE]
RIVALS = {  # contenders of the stage diffusers, and the batches
    "cuda": (
        ("fastddpm graph bf16", "diffusers eager fp32", "diffusers eager bf16", "diffusers compiled bf16"),
        (1, 64),
    ),
    "cpu": (("fastddpm eager bf16", "diffusers eager fp32", "diffusers eager bf16"), (1,)),
    "tiny": (("fastddpm eager fp32", "diffusers eager fp32"), (2,)),
}[SCALE]
ROUNDS, ROUND_S = (3, 0.001) if SCALE == "tiny" else (10, 0.1)
ON_GPU = DEVICE.type == "cuda"
ENGINES = ("graph", "eager") if ON_GPU else ("eager",)
LAUNCHES = 200
hash_of_stage, failures = "", 0  # of the stage that this process runs


@contextmanager
def result(name: str) -> Iterator[dict[str, Any]]:
    """Gives the fields of a result, to be filled in, and tells of it at the end."""
    global failures
    fields: dict[str, Any] = {"hash": hash_of_stage}
    try:
        with Watch(gpu_uuid(DEVICE)) as watch:
            yield fields
        tell(name, **fields, watch=watch.facts, invalid=watch.invalid)
    except Exception as error:
        failures += 1
        tell(name, "failed", f"{type(error).__name__}: {error}".partition("\n")[0])
    torch.cuda.empty_cache()


def timed(run: Call, n: int, before: Call = lambda: None) -> dict[str, Any]:
    """The fields of a time: run() makes n calls."""
    samples = []
    for _ in range(ROUNDS):
        before()
        machine.wait()
        samples.append(machine.timed(run) / n)
    return {"samples_s": samples, "calls": n, "clock": machine.CLOCK, "cache": "hot"}


# What the check is for: a graph gives the bits of eager steps


def smoke() -> None:
    fast = "graph" if ON_GPU else "auto"
    with result("machine") as fields:
        fields["facts"] = machine.description() | {"scale": SCALE}
    for precision in ("bf16", "fp32"):
        with result(f"{fast} = eager, {precision}") as fields:
            one, other = (
                Sampler(network(MODEL), device=DEVICE, precision=precision, engine=engine).sample(
                    2, steps=20, progress=False
                )
                for engine in (fast, "eager")
            )
            fields["errors"] = machine.same_bits(one, other)


# Steps


def steps() -> None:
    for benchmark in (False, True):  # which races for seconds at each batch
        for batch in BATCHES:
            for engine in ENGINES:
                with result(f"batch {batch}, {engine}{', cudnn.benchmark' * benchmark}") as fields:
                    torch.backends.cudnn.benchmark = benchmark
                    fields["params"] = {"batch": batch, "engine": engine, "cudnn_benchmark": benchmark}
                    with slots_of(MODEL, batch, who := Contender("fastddpm", engine, "bf16")) as slots:
                        fields |= judged_steps(slots, who)
                        if batch in PROFILED and not benchmark:
                            fields["facts"] = kernels(slots)
    torch.backends.cudnn.benchmark = False


def judged_steps(slots: Slots, who: Contender) -> dict[str, Any]:
    errors, batch = judge_a_step(slots, MODEL, who), len(slots.x)
    start(slots)
    seconds = machine.timed(partial(advance, slots, 3)) / 3
    n = min(T // 2, max(1, math.ceil(ROUND_S / seconds)))
    return timed(partial(advance, slots, n), n, partial(start, slots)) | {
        "group": f"steps, {MODEL}, batch {batch}",
        "contender": " ".join(who),
        "bytes": moved(MODEL, batch, "bf16"),
        "flops": batch * flops(MODEL),
        "images": batch / T,
        "precision": "bf16",
        "errors": errors,
    }


def start(slots: Slots) -> None:
    """At the first of all steps; not clipped, as in the gate, so that it needs no second graph."""
    slots.load(Schedule(clip_sample=False).table(), noise.address(0, len(slots.x)))


def advance(slots: Slots, n: int) -> None:
    for _ in range(n):
        slots.advance()


def kernels(slots: Slots) -> dict[str, Any]:
    """What runs in a step: launches and seconds by kind of kernel, microseconds by name."""
    n = 2 if SCALE == "tiny" else 20
    start(slots)
    launches, kinds_s, names_us = Counter(), Counter(), Counter()
    for name, kind, microseconds in kinds.events(partial(advance, slots, n)):
        launches[kind] += 1 / n
        kinds_s[kind] += microseconds / n / 1e6
        names_us[name] += microseconds / n
    return {"launches": dict(launches), "kinds_s": dict(kinds_s), "names_us": dict(names_us.most_common(60))}


# The hardware


def hardware() -> None:
    with result("ceilings") as fields:
        fields["facts"] = {"ceilings": machine.ceilings()}
    with result(f"{LAUNCHES} empty kernels") as fields:
        x = torch.zeros(1, device=DEVICE)
        empty = partial(torch.cuda._sleep, 0) if ON_GPU else partial(x.add_, 1)
        run = partial(machine._each, [empty] * LAUNCHES)
        run()
        fields |= timed(capture(run, DEVICE).replay if ON_GPU else run, LAUNCHES)
    for batch in PROFILED:
        for (shape, conv), count in convolutions(batch).items():
            kernel, stride, side = conv.kernel_size[0], conv.stride[0], shape[2]
            channels = f"{conv.in_channels} to {conv.out_channels} channels"
            with result(f"batch {batch}, {count} of {channels}, {kernel} x {kernel} / {stride} at {side}") as fields:
                x = layout.empty(shape[0], shape[1:], dtype=DTYPE, device=DEVICE).normal_()
                y = conv(x)
                run, n = machine.repeated(partial(conv, x), ROUND_S / 10)
                fields |= timed(run, n)
                fields |= {"bytes": x.nbytes + y.nbytes + conv.weight.nbytes, "precision": "bf16"}
                fields["flops"] = 2 * y.numel() * conv.in_channels * kernel**2


def convolutions(batch: int) -> Counter[tuple[tuple[int, ...], nn.Conv2d]]:
    """The network's convolutions, each shape once, with how many there are."""
    net, found, first = network(MODEL).for_inference(DTYPE, DEVICE), Counter(), {}

    def note(conv: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
        shape = tuple(args[0].shape)
        same = shape, conv.out_channels, conv.kernel_size, conv.stride, conv.bias is None
        found[first.setdefault(same, (shape, conv))] += 1

    hooks = [m.register_forward_pre_hook(note) for m in net.modules() if isinstance(m, nn.Conv2d)]
    x = torch.zeros(batch, *sample_shape(net), dtype=DTYPE, device=DEVICE)
    with torch.no_grad():
        net.denoise(layout.channels_last(x), net.time_rows(torch.zeros(1, dtype=torch.int64, device=DEVICE)))
    for hook in hooks:
        hook.remove()
    return found


# Upsampling, in phases or not


def upsampling() -> None:
    """Both ways in turns; whichever wins at these batches becomes `unet.PHASES`."""
    who = Contender("fastddpm", ENGINES[0], "bf16")
    for batch in PROFILED:
        with ExitStack() as stack:
            ways = {}
            for name, devices in (("interpolated", ()), ("in phases", ("cpu", "cuda"))):
                with patch.object(unet, "PHASES", devices):
                    ways[name] = stack.enter_context(slots_of(MODEL, batch, who))
            turns = [*ways, *(f"{name}, again" for name in reversed(ways))]
            for turn in turns:
                with result(f"batch {batch}, {turn}") as fields:
                    fields |= judged_steps(ways[turn.removesuffix(", again")], who)
                    fields |= {"group": f"upsampling, {MODEL}, batch {batch}", "contender": turn}


# Others


def diffusers() -> None:
    if not find_spec("diffusers"):
        return tell("diffusers", "skipped", "diffusers is not installed")
    names, batches = RIVALS
    for name in names:  # what is compiled comes last
        for batch in batches:
            who = Contender(*name.split())
            with result(f"batch {batch}, {name}") as fields:
                n = {"cuda": 100, "cpu": 5, "tiny": 2}[SCALE]
                with loop(MODEL, batch, n, who) as ready:
                    fields |= timed(ready.run, n) | {"errors": ready.errors, "facts": {"prepare_s": ready.seconds}}
                fields |= {"group": f"steps, {MODEL}, batch {batch}", "contender": name, "images": batch / T}
                fields |= {"flops": batch * flops(MODEL), "precision": who.ceiling}
    return None


# Every kernel at ragged shapes, for a tool that watches its accesses


def ragged() -> None:
    if not os.environ.get(lines.WATCHED):
        tell("compute-sanitizer", "skipped", "it is not installed, so nothing watched the accesses of memory")
    for name, call in {**RAGGED, **{f"{name}, one element": call for name, call in RAGGED.items()}}.items():
        with result(name):
            call((1, 4, 1, 1) if "one element" in name else (3, 20, 7, 11))
            machine.wait()


def _drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return layout.empty(shape[0], shape[1:], dtype=dtype, device=DEVICE).normal_()


def _step(shape: tuple[int, ...]) -> None:
    n, table = shape[0], SCHEDULE.table().to(DEVICE)
    pos, bad = (torch.full((n,), value, dtype=torch.int32, device=DEVICE) for value in (999, -1))
    ops.step(_drawn(shape), _drawn(shape, DTYPE), table, pos, noise.address(0, n, DEVICE), out_dtype=DTYPE, bad=bad)


def _predict_step(shape: tuple[int, ...]) -> None:
    rows = torch.ones(21, 8, device=DEVICE)
    ops.predict_step(_drawn(shape), _drawn(shape), rows, 5, clip=1.0, address=noise.address(0, shape[0], DEVICE))


def _noised(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x_0 = layout.empty(shape[0], shape[1:], dtype=torch.uint8, device=DEVICE).random_(256)
    return x_0, torch.arange(shape[0], device=DEVICE), noise.address(0, shape[0], DEVICE)


def _noising(shape: tuple[int, ...]) -> None:
    ops.noising(*_noised(shape), SCHEDULE.noising_table().to(DEVICE), dtype=DTYPE)


def _eps_loss(shape: tuple[int, ...]) -> None:
    m = _drawn(shape, DTYPE).requires_grad_()
    ops.eps_loss(m, *_noised(shape), SCHEDULE.noising_table().to(DEVICE), predicts="v_prediction").sum().backward()


def _x_0_error(shape: tuple[int, ...]) -> None:
    table = torch.ones(T, 7, device=DEVICE)
    ops.x_0_error(_drawn(shape, DTYPE), *_noised(shape), table)


def _group_norm(shape: tuple[int, ...]) -> None:
    """By programs that hold their groups, and by several that share one."""
    for n, c, *pixels in (shape, (1, 4, 70, 61)):
        x, skip = _drawn((n, c, *pixels), DTYPE), _drawn((n, c, *pixels), DTYPE)
        weight, bias, add = (torch.ones(shape, device=DEVICE) for shape in ((2 * c,), (2 * c,), (n, 2 * c)))
        ops.group_norm(x, weight, bias, 2, eps=1e-5, skip=skip, add=add, silu=True)


def _residual(shape: tuple[int, ...]) -> None:
    ops.residual(_drawn(shape, DTYPE), _drawn(shape, DTYPE), torch.ones(shape[1], device=DEVICE))


def _interleave(shape: tuple[int, ...]) -> None:
    n, c, height, width = shape
    ops.interleave(_drawn((n, c, height + 1, width + 1), DTYPE), torch.ones(c // 4, device=DEVICE))


RAGGED: dict[str, Callable[[tuple[int, ...]], None]] = {
    "step": _step, "predict_step": _predict_step, "noising": _noising, "eps_loss": _eps_loss, "x_0_error": _x_0_error,
    "group_norm": _group_norm, "residual": _residual, "interleave": _interleave,
}  # fmt: skip
STAGES: dict[str, Callable[[], None]] = {
    "smoke": smoke, "steps": steps, "hardware": hardware, "upsampling": upsampling, "diffusers": diffusers,
    "ragged": ragged,
}  # fmt: skip


def main(name: str) -> int:
    """Run a stage; the exit status of its process."""
    global hash_of_stage
    wanted = os.environ.get(lines.DEVICE, DEVICE.type)
    if DEVICE.type != wanted:
        print(f"torch finds no GPU; use --device {DEVICE.type}")
        return 2
    hash_of_stage = records.source_hash(STAGES[name])
    STAGES[name]()
    print(f"{failures} results failed")
    return 1 if failures else 0
