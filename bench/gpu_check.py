"""Check and measure fastddpm on a GPU in one command: python -m bench.gpu_check --help

Stages run one after the other, the most important first. Each is a separate process with a time limit, so a stage that
hangs or crashes does not affect the results of the others. The output folder holds four files: check.jsonl, one line
per result, written as soon as it is known; check.log, the output of all stages; check.txt, a summary; report.html.

Runs from a checkout without installation. `python -m bench.gpu_records` converts the results into benchmark records.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from bench import gpu_records, gpu_results, records, report
from bench.chart import SECONDS, figure, percent, quantity
from bench.gpu_results import Line
from bench.history import Result
from bench.report import write

ROOT = Path(__file__).resolve().parents[1]
LOG, SUMMARY, REPORT = "check.log", "check.txt", "report.html"
MIN_SECONDS = 5  # with less time left, no stage is started
MAX_LOG = 1 << 20  # bytes per stage: some machines return no file of more than 16 MiB
SHOWN = 15  # kernels of a profile, in the summary
KERNEL_TESTS = ("tests/kernels", "tests/ops")
ENGINE_TESTS = (
    "tests/sampling/test_gpu.py",
    "tests/sampling/test_gpu_job.py",
    "tests/sampling/test_parallel.py",
    "tests/evaluate/test_gpu.py",
    "tests/train/test_gpu.py",
)


class Stage(NamedTuple):
    """A process of the check: a command, run with a time limit and extra environment variables."""

    name: str
    limit_s: float
    command: Sequence[str]
    environment: Mapping[str, str] = MappingProxyType({})
    proof: str = ""  # the output of a stage that passes contains this


def all_stages() -> list[Stage]:
    """Return the stages, the most important first."""
    large, compiled = "without_memory or beyond_32_bits", "compiled"  # -k: many GB of memory; minutes of torch.compile
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    options = ["--report-api-errors=no", "--destroy-on-device-error=kernel", "--error-exitcode=9", "--print-limit=20"]
    options += ["--launch-timeout=80"]  # seconds until the first kernel; torch is slow to import under the tool
    memcheck, clean = ([sanitizer, *options], "ERROR SUMMARY: 0 errors") if sanitizer else ([], "")
    # no caching allocator: in its large blocks, an out-of-bounds access hits other allocated memory and goes unnoticed
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", gpu_results.SANITIZER_VARIABLE: sanitizer or ""}
    one_thread = {"OMP_NUM_THREADS": "1"}  # per process: several share the cores
    return [
        Stage("smoke", 90, _measure("smoke")),
        Stage("steps", 150, _measure("steps")),
        # profiles distort what is timed later in their process, and CUPTI may crash if it is torn down
        Stage("kernels", 75, _measure("kernels"), {"TEARDOWN_CUPTI": "0"}),
        Stage("hardware", 80, _measure("hardware")),
        Stage("upsampling", 75, _measure("upsampling")),
        Stage("parallel", 75, _measure("parallel")),
        Stage("robot", 75, _measure("robot")),
        Stage("kernel tests", 120, _pytest(KERNEL_TESTS, f"not ({large})", processes=14), one_thread),
        Stage("engine tests", 120, _pytest(ENGINE_TESTS, f"not ({large} or {compiled})", processes=4), one_thread),
        Stage("diffusers", 120, _measure("diffusers")),
        Stage("memcheck", 90, [*memcheck, *_measure("memcheck")], uncached, clean),
        Stage("memory tests", 60, _pytest((*KERNEL_TESTS, "tests/sampling/test_gpu.py"), large), one_thread),
        Stage("compiled tests", 180, _pytest(ENGINE_TESTS, compiled, processes=4), one_thread),
    ]


def _measure(name: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; from bench.gpu_stages import main; sys.exit(main({name!r}))"]


def _pytest(files: Iterable[str], select: str, processes: int = 1) -> list[str]:
    """The pytest command for the GPU tests in these files; warnings are not errors, as versions may differ."""
    common = ["-q", "--tb=short", "-m", "cuda", "-o", "filterwarnings=default", "-o", "faulthandler_timeout=45"]
    common += ["-p", "no:cacheprovider", "-p", "bench.gpu_results"]
    parallel = ["-n", str(min(processes, os.cpu_count() or 1))] if processes > 1 and find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", *files, *common, "-k", select, *parallel]


# Running the stages


def start_results(out: Path, seconds: float, device: str) -> None:
    """Delete the files of an earlier check and write the first line of results, which describes the whole check."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (gpu_results.FILE, LOG, SUMMARY, REPORT):
        (out / name).unlink(missing_ok=True)
    commit, dirty = records.commit()
    line = {"check": 1, "run": records.now(), "commit": commit, "dirty": dirty, "device": device, "seconds": seconds}
    records.append(out / gpu_results.FILE, line)


def run_stages(out: Path, seconds: float, device: str, stages: Iterable[Stage]) -> None:
    """Run the stages in order, within this many seconds in total; append one line for each stage."""
    end = time.monotonic() + seconds
    for stage in stages:
        print(f"{stage.name:<14}", end="", flush=True)
        began = time.monotonic()
        if end - began < MIN_SECONDS:
            outcome, reason = "skipped", "no time left"
        else:
            outcome, reason = _run_stage(stage, min(stage.limit_s, end - began), out, device)
        took = time.monotonic() - began
        line = {"stage": stage.name, "name": "", "time": records.now(), "outcome": outcome, "reason": reason}
        records.append(out / gpu_results.FILE, line | {"seconds": took})
        print(f" {outcome:<8}{took:7.1f} s  {reason or ''}", flush=True)


def _run_stage(stage: Stage, limit_s: float, out: Path, device: str) -> tuple[str, str | None]:
    """Run one stage, then kill any remaining processes of its group. Returns: (outcome, reason)."""
    environment = os.environ | {
        gpu_results.FILE_VARIABLE: str((out / gpu_results.FILE).resolve()),
        gpu_results.STAGE_VARIABLE: stage.name,
        gpu_results.DEVICE_VARIABLE: device,
        gpu_results.LIMIT_VARIABLE: f"{limit_s:.0f}",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    with (out / LOG).open("ab") as log:
        log.write(f"\n== {stage.name}: {' '.join(stage.command)}\n".encode())
        log.flush()
        start = log.tell()
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment | stage.environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return "failed", str(error)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the stage and its child processes
            with suppress(subprocess.TimeoutExpired):  # a process in the driver may not end
                process.wait(10)
    output = _shorten(out / LOG, start)
    if status is None:
        return "failed", f"timed out after {limit_s:.0f} s"
    if status:
        last = next((line.strip() for line in reversed(output.split("\n")) if line.strip()), "no output")
        return "failed", f"exit status {status}: {last}"[:300]
    if stage.proof not in output:
        return "failed", f"its output does not contain {stage.proof!r}"
    return "passed", None


def _shorten(log: Path, start: int) -> str:
    """Shorten what a stage has printed, from `start` on, to MAX_LOG bytes. Returns: the shortened output."""
    whole = log.read_bytes()
    output = whole[start:]
    if len(output) > MAX_LOG:
        output = output[: MAX_LOG // 2] + b"\n... cut ...\n" + output[-MAX_LOG // 2 :]
        log.write_bytes(whole[:start] + output)
    return output.decode(errors="replace")


# The summary


def summary(lines: Sequence[Line]) -> str:
    """Return the text of the summary: the machine, the stages, the timings and the failures."""
    found = gpu_records.to_records(lines)
    machine, ceilings = (found[0][name] if found else {} for name in ("machine", "ceilings"))
    versions = (f"{name} {machine.get(name)}" for name in ("torch", "triton", "cuda", "cudnn", "driver", "diffusers"))
    rates = (f"{name} {figure(rate)} {'GB/s' if name == 'copy' else 'TFLOP/s'}" for name, rate in ceilings.items())
    rows = [f"{machine.get('gpu') or machine.get('cpu') or 'unknown machine'}: {', '.join(versions)}"]
    rows += [f"ceilings: {', '.join(rates) or 'not measured'}", ""]
    rows.append(f"{'stage':<16}{'outcome':<9}{'seconds':>8}  results")
    for record in found:
        if ": " not in record["name"]:
            counts = [f"{count} {outcome}" for outcome, count in record["facts"]["results"].items()]
            seconds = f"{record['facts']['seconds']:.1f}"
            rows.append(f"{record['name']:<16}{record['outcome']:<9}{seconds:>8}  {', '.join(counts) or 'none'}")
    rows += ["", f"{'timing':<72}{'median':>9}  quartiles"]
    for result in map(Result, found):
        if result.timed:
            rows.append(_timing_line(result))
        if launches := result.record["facts"].get("launches"):
            rows.append(result.record["name"])
            seconds = result.record["facts"]["kinds_s"]
            parts = (f"{kind} {n:g} ({quantity(seconds[kind], SECONDS)})" for kind, n in launches.items())
            rows.append(f"    {sum(launches.values()):g} launches per step: {'; '.join(parts)}")
            names = list(result.record["facts"]["names_us"].items())[:SHOWN]
            rows += [f"    {microseconds:>10.1f} us  {name[:100]}" for name, microseconds in names]
    if failed := [record for record in found if record["outcome"] == "failed"]:
        rows += ["", "failed", *(f"  {record['name']}: {record['reason']}" for record in failed)]
    return "\n".join(rows) + "\n"


def _timing_line(result: Result) -> str:
    low, middle, high = (quantity(value, SECONDS) for value in result.quartiles or ())
    columns = [f"{low} to {high}"]
    columns += [f"{figure(s['rate'])} {unit} ({percent(s['share'])})" for unit, s in result.record["shares"].items()]
    columns += [f"{figure(result.images)} images/s"] if result.images else []
    columns += [f"INVALID: {why}" for why in result.record["invalid"]]
    return f"{result.record['name']:<72}{middle:>9}  {', '.join(columns)}"


def write_summary(out: Path) -> None:
    """Write and print the summary, and write the HTML report."""
    lines = gpu_results.read_results(out)
    text = summary(lines)
    write(out / SUMMARY, text)
    if found := gpu_records.to_records(lines):
        write(out / REPORT, report.page(found))
    print(f"\n{text}\n{out}", flush=True)


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns: the exit status, 1 if anything failed, else 0."""
    by_name, folder = {stage.name: stage for stage in all_stages()}, ROOT / "build" / "gpu-check"
    text, default = "Check and measure fastddpm on a GPU.", "(default: %(default)s)"
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=text)
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=folder, help=f"folder for the results {default}")
    parser.add_argument("--seconds", type=float, default=540, help=f"time limit of the whole check {default}")
    text = f"cpu: run without a GPU, to test the check itself {default}"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=text)
    text = f"run only these stages: {', '.join(by_name)}"
    parser.add_argument("--only", metavar="STAGE", nargs="+", choices=by_name, help=text)
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        parser.error(f"--seconds is {args.seconds:g}; want more than 0")
    try:
        start_results(args.out, args.seconds, args.device)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as on Ctrl-C, the summary is still written
    try:
        run_stages(args.out, args.seconds, args.device, [by_name[name] for name in args.only or by_name])
    finally:
        write_summary(args.out)
    return int(any(line.get("outcome") == "failed" for line in gpu_results.read_results(args.out)))


if __name__ == "__main__":
    sys.exit(main())
