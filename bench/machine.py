"""This machine: its description, its rates of copies and matrix products, and the timing of calls on it."""

import gc
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from itertools import accumulate
from statistics import median
from typing import Any

import torch

from fastddpm.core.precision import PRECISIONS, arithmetic
from fastddpm.sampling.capture import capture
from fastddpm.verify.accuracy import accuracy, unequal

Call = Callable[[], object]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = "tiny" if os.environ.get("BENCH_TINY") else DEVICE.type  # of all sizes; tiny: to check that everything runs
LAUNCHES = 20  # at most, in one captured graph


@cache
def description() -> dict[str, Any]:
    """Return what must be equal for two records to be comparable: device and versions."""
    import triton

    gpu = torch.cuda.get_device_properties(0) if DEVICE.type == "cuda" else None
    cpu = None
    with suppress(ImportError):
        import cpuinfo  # a dependency of pytest-benchmark

        cpu = cpuinfo.get_cpu_info().get("brand_raw")
    return {
        "gpu": gpu and gpu.name,
        "gpu_memory_gb": gpu and gpu.total_memory / 1e9,
        "l2_mb": gpu and gpu.L2_cache_size / 1e6,
        "cpu": cpu or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "diffusers": __import__("diffusers").__version__ if find_spec("diffusers") else None,
    }


def say(text: str) -> None:
    """Print on a new line, wherever pytest left the cursor."""
    print("\n" + text, end="", flush=True)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Moment:
    """A point in the queue of the GPU's current stream. A difference is in seconds and waits for the later point."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock() -> Any:
    """Return the time now; differences are seconds. On a GPU this is the device's time, so waiting does not count."""
    return Moment() if DEVICE.type == "cuda" else time.perf_counter()


CLOCK = "cuda events" if DEVICE.type == "cuda" else "wall"


@cache
def _evicting() -> torch.Tensor:
    size = 4 << 20 if SCALE == "tiny" else 64 << 20
    if DEVICE.type == "cuda":
        size = max(4 * size, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
    return torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()


def empty_caches() -> None:
    """Fill the L2 cache with data that no benchmark reads.

    This keeps a GPU busy for as long as Python takes to launch what is timed next. The last-level cache of a server's
    CPU may be larger and keep the inputs.
    """
    _evicting().add_(1)


def rotated(calls: Sequence[Call], *, captured: bool) -> tuple[Call, int]:
    """Return (run, n): run() makes each of n calls once, so that none finds its inputs in the cache.

    captured: on a GPU run() replays a graph, because launching from Python takes longer than many kernels.
    """
    for call in calls:
        call()  # libraries and compilers do some work once
    if captured and DEVICE.type == "cuda":
        return _captured(calls), len(calls)
    return partial(call_each, calls), len(calls)


def repeated(call: Call, seconds: float = 0.01, *, captured: bool = True) -> tuple[Call, int]:
    """Return (run, n): run() makes n calls, which take about `seconds`; captured: as in `rotated`, some per graph.

    Inputs and outputs are as hot as their size allows, as they are in a network.
    """
    call()
    fit = math.ceil(seconds / max(timed(call), 1e-9))  # a graph of many long calls would run for minutes
    run, calls = rotated([call] * (min(fit, LAUNCHES) if captured and DEVICE.type == "cuda" else 1), captured=captured)
    times = max(1, math.ceil(seconds / max(timed(run), 1e-9)))
    return partial(call_each, [run] * times), times * calls


def timed(run: Call) -> float:
    """Return the seconds that run() takes."""
    began = clock()
    run()
    return clock() - began


def race(contenders: dict[str, Call], *, rounds: int = 5, seconds: float = 0.01) -> dict[str, float]:
    """Return the seconds per call of each, the fastest first: medians over rounds in which they take turns."""
    runs = {name: repeated(call, seconds) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, n) in runs.items():
            times[name].append(timed(run) / n)
    return dict(sorted(((name, median(values)) for name, values in times.items()), key=lambda item: item[1]))


# Gates: wrong results are not timed


def judged(ours: torch.Tensor, plain: torch.Tensor, ref: torch.Tensor) -> dict[str, Any]:
    """Return the errors of a result, which are at most twice those of plain torch in the same dtype; ref is float64.

    Raises: AssertionError: they are larger.
    """
    errors = {name: {"error": error, "bound": bound} for name, error, bound in accuracy(ours, plain, ref)}
    for name, found in errors.items():
        assert found["error"] <= found["bound"] < math.inf, (
            f"{name} error is {found['error']:.3g}, twice plain torch's {found['bound']:.3g}"
        )
    return errors


def same_bits(ours: torch.Tensor, want: torch.Tensor) -> dict[str, Any]:
    """Compare bit for bit. Raises: AssertionError: some bit differs."""
    assert (wrong := unequal(ours, want)) == 0, f"{wrong:g} of {want.numel()} elements differ"
    return {"bits": "equal"}


def right(contenders: dict[str, Call], check: Callable[[Any], object]) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the contenders whose results pass the check, and the errors of the others, which are not timed."""
    wrong = {}
    for name, call in contenders.items():
        try:
            check(call())
        except Exception as error:  # Triton's errors have no common class
            wrong[name] = str(error).partition("\n")[0]
    return {name: call for name, call in contenders.items() if name not in wrong}, wrong


def ceilings() -> dict[str, float]:
    """Return the ceilings: "copy" in GB/s read and written, each precision in TFLOP/s of a matrix product.

    Each is the best of several rounds: a disturbance of a round is not a limit of the hardware.
    """
    size = {"cuda": 1 << 30, "cpu": 1 << 28, "tiny": 1 << 16}[SCALE]
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()  # zeros would be faster than data
    rates = {"copy": 2 * size / _fastest(partial(torch.empty_like(source).copy_, source)) / 1e9}
    side = {"cuda": 8192, "cpu": 1024, "tiny": 32}[SCALE]
    for precision, dtype in PRECISIONS.items():
        if precision == "tf32" and DEVICE.type == "cpu":
            continue
        a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
        with arithmetic(precision, DEVICE):
            rates[precision] = 2 * side**3 / _fastest(partial(torch.mm, a, b)) / 1e12
    return rates


def _fastest(call: Call, rounds: int = 20, enough_s: float = 1.0) -> float:
    """Return the seconds per call in the fastest round. A slow call (16-bit products on some CPUs) is timed once."""
    if DEVICE.type == "cpu" and (seconds := timed(call)) > enough_s:
        return seconds
    run, n = repeated(call)
    return min(timed(run) / n for _ in range(rounds))


def peak_bytes(call: Call) -> int:
    """Return the most bytes that a call had allocated at one time, beyond those allocated before."""
    gc.collect()  # otherwise older garbage could be freed meanwhile
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


def _captured(calls: Sequence[Call]) -> Call:
    """Capture the calls in a CUDA graph. Returns: a function that replays it."""
    graph = capture(partial(call_each, calls), DEVICE)

    def replay() -> Sequence[Call]:
        graph.replay()
        return calls  # keeps the tensors alive that the graph reads

    return replay


def call_each(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
