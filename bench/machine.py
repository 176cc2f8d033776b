"""This machine: what it is, how fast it copies and multiplies, and how a call is timed on it."""

import gc
import math
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from statistics import median
from typing import Any

import torch

from fastddpm.engine import PRECISIONS, arithmetic

Call = Callable[[], object]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = "tiny" if os.environ.get("BENCH_TINY") else DEVICE.type  # of all sizes; tiny: to see that everything runs
LAUNCHES = 20  # in one captured graph


def description() -> dict[str, Any]:
    """What a record must tell to be compared with another: device and versions."""
    import triton

    gpu = torch.cuda.get_device_properties(0) if DEVICE.type == "cuda" else None
    return {
        "gpu": gpu and gpu.name,
        "gpu_memory_gb": gpu and gpu.total_memory / 1e9,
        "l2_mb": gpu and gpu.L2_cache_size / 1e6,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "scale": SCALE,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "diffusers": __import__("diffusers").__version__ if find_spec("diffusers") else None,
    }


def say(text: str) -> None:
    """Print lines of their own, wherever pytest has left the cursor."""
    print("\n" + text, end="", flush=True)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def repeated(call: Call, seconds: float = 0.01) -> tuple[Call, int]:
    """(run, n): run() makes n calls, which take about `seconds`, and waits for them.

    On a GPU they are replays of a captured graph: launching from Python takes longer than many a kernel. What a call
    reads and writes is as hot as its size allows, as it is in a network.
    """
    calls = 1
    if DEVICE.type == "cuda":
        call, calls = _captured(call), LAUNCHES
    _times(call, 1)
    once = _seconds(partial(_times, call, 1))
    times = max(1, math.ceil(seconds / once))
    return partial(_times, call, times), times * calls


def race(contenders: dict[str, Call], *, rounds: int = 5, seconds: float = 0.01) -> dict[str, float]:
    """Seconds per call of each, the fastest first: medians of rounds in which they take turns."""
    runs = {name: repeated(call, seconds) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, n) in runs.items():
            times[name].append(_seconds(run) / n)
    return dict(sorted(((name, median(values)) for name, values in times.items()), key=lambda item: item[1]))


def right(contenders: dict[str, Call], check: Callable[[Any], None]) -> tuple[dict[str, Call], dict[str, str]]:
    """Those whose results pass the check, and what is wrong with the others: they are not timed."""
    wrong = {}
    for name, call in contenders.items():
        try:
            check(call())
        except Exception as error:  # Triton's are of no common kind
            wrong[name] = str(error).partition("\n")[0]
    return {name: call for name, call in contenders.items() if name not in wrong}, wrong


def ceilings() -> dict[str, float]:
    """copy: GB/s of a device copy, bytes read and written; else TFLOP/s of a matrix product in that precision."""
    size = {"cuda": 1 << 30, "cpu": 1 << 28, "tiny": 1 << 16}[SCALE]
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()  # zeros would be faster than data
    copy = race({"copy": partial(torch.empty_like(source).copy_, source)})["copy"]
    rates = {"copy": 2 * size / copy / 1e9}
    side = {"cuda": 8192, "cpu": 1024, "tiny": 32}[SCALE]
    for precision, dtype in PRECISIONS.items():
        if precision == "tf32" and DEVICE.type == "cpu":
            continue
        a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
        with arithmetic(precision, DEVICE):
            rates[precision] = 2 * side**3 / race({precision: partial(torch.mm, a, b)})[precision] / 1e12
    return rates


def peak_bytes(call: Call) -> int:
    """The most that a call had allocated at one moment, beyond what there was before."""
    gc.collect()  # else what was there before might go meanwhile
    if DEVICE.type == "cuda":
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        wait()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())), initial=0))


def _captured(call: Call) -> Call:
    """LAUNCHES calls as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()  # compiles, and makes what libraries make once
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()

    def replay() -> Call:
        graph.replay()
        return call  # whose tensors the graph reads: they must live as long

    return replay


def _times(call: Call, n: int) -> None:
    for _ in range(n):
        call()
    wait()


def _seconds(run: Call) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
