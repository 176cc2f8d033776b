"""What the first minutes on a GPU are to show, in one command: python -m bench.gpu_check --help

Stages run one after the other, the most important first. Each is a process of its own with a time limit, so one that
hangs or crashes costs no other stage its results. The folder then holds four files: check.jsonl, a line for each
result, written as soon as it is known; check.log, all that the stages printed; check.txt, a table; report.html.

It runs from a plain checkout, without installing anything. `python -m bench.gpu_records` makes records of the lines.
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
from typing import Any, NamedTuple

from bench import gpu_records, records, report
from bench.chart import SECONDS, figure, percent, quantity
from bench.gpu_records import LINES
from bench.history import Result
from bench.lines import DEVICE, FILE, STAGE, WATCHED, now
from bench.report import write

ROOT = Path(__file__).resolve().parents[1]
LOG, TABLE, REPORT = "check.log", "check.txt", "report.html"
ENOUGH = 5  # seconds without which no stage is started
KERNEL_TESTS = (
    "kernels",
    "philox",
    "group_norm",
    "residual",
    "upsample",
    "predict_step",
    "eps_loss",
    "x_0_error",
    "ops",
)
ENGINE_TESTS = ("gpu", "gpu_job", "gpu_likelihood", "gpu_training")


class Stage(NamedTuple):
    name: str
    seconds: float  # its limit
    command: Sequence[str]
    environment: Mapping[str, str] = MappingProxyType({})


def stages() -> list[Stage]:
    """All of them, the most important first."""
    apart = "compiled", "without_memory"  # minutes of torch.compile; tests that fill the memory of the GPU
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    watched = [sanitizer, "--tool=memcheck", "--error-exitcode=9", "--print-limit=20"] if sanitizer else []
    # torch's cache of memory would hide an access out of bounds: it would be one to another tensor
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", WATCHED: sanitizer or ""}
    return [
        Stage("smoke", 90, _measuring("smoke")),
        Stage("steps", 150, _measuring("steps")),
        Stage("hardware", 60, _measuring("hardware")),
        Stage("upsampling", 45, _measuring("upsampling")),
        Stage("kernel tests", 90, _testing(KERNEL_TESTS, processes=8)),
        Stage("engine tests", 120, _testing(ENGINE_TESTS, "-k", f"not {' and not '.join(apart)}", processes=4)),
        Stage("memory tests", 30, _testing(["gpu"], "-k", "without_memory")),
        Stage("diffusers", 120, _measuring("diffusers")),
        Stage("memcheck", 90, [*watched, *_measuring("ragged")], uncached),
        Stage("compiled tests", 180, _testing(ENGINE_TESTS, "-k", "compiled", processes=4)),
    ]


def _measuring(name: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; from bench.gpu_stages import main; sys.exit(main({name!r}))"]


def _testing(names: Iterable[str], *which: str, processes: int = 1) -> list[str]:
    """The tests that need a GPU, by whatever pytest there is; warnings of other versions are not errors."""
    files = [f"tests/test_{name}.py" for name in names]
    options = ["-q", "-m", "cuda", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "-p", "bench.lines"]
    spread = ["-n", str(min(processes, os.cpu_count() or 1))] if processes > 1 and find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", *files, *options, *which, *spread]


# Running them


def check(out: Path, seconds: float, device: str, planned: Sequence[Stage]) -> None:
    """Run the stages within so many seconds."""
    end, lines = time.monotonic() + seconds, out / LINES
    for stage in planned:
        print(f"{stage.name:<14}", end="", flush=True)
        began = time.monotonic()
        if end - began < ENOUGH:
            outcome, reason = "skipped", "no time was left"
        else:
            outcome, reason = _run(stage, min(stage.seconds, end - began), out, device)
        took = time.monotonic() - began
        done = {"stage": stage.name, "name": "", "time": now(), "outcome": outcome, "reason": reason, "seconds": took}
        records.append(lines, done)
        print(f" {outcome:<8}{took:7.1f} s  {reason or ''}", flush=True)


def begin(out: Path, seconds: float, device: str) -> None:
    """Empty the folder of what an earlier check left, and write the first line, which is about all of the check."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (LINES, LOG, TABLE, REPORT):
        (out / name).unlink(missing_ok=True)
    commit, dirty = records.commit()
    about = {"check": 1, "run": now(), "commit": commit, "dirty": dirty, "device": device, "seconds": seconds}
    records.append(out / LINES, about)


def _run(stage: Stage, limit: float, out: Path, device: str) -> tuple[str, str | None]:
    """(outcome, reason) of a stage, whose processes have ended by then."""
    environment = os.environ | stage.environment
    environment |= {FILE: str((out / LINES).resolve()), STAGE: stage.name, DEVICE: device}
    environment |= {"PYTHONUNBUFFERED": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    with (out / LOG).open("ab") as log:
        log.write(f"\n== {stage.name}: {' '.join(stage.command)}\n".encode())
        log.flush()
        begins = log.tell()
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return "failed", str(error)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "failed", f"ended after {limit:.0f} s, its limit"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
    if status == 0:
        return "passed", None
    printed = (out / LOG).read_bytes()[begins:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(printed) if line.strip()), "it printed nothing")
    return "failed", f"exit status {status}: {last}"[:300]


# What is shown of them


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """The table: the machine, the stages, what was timed, what failed."""
    found = gpu_records.of(lines)
    machine, ceilings = (found[0][name] if found else {} for name in ("machine", "ceilings"))
    versions = (f"{name} {machine.get(name)}" for name in ("torch", "triton", "cuda", "cudnn", "driver", "diffusers"))
    rates = (f"{name} {figure(rate)} {'GB/s' if name == 'copy' else 'TFLOP/s'}" for name, rate in ceilings.items())
    rows = [f"{machine.get('gpu') or machine.get('cpu') or 'unknown machine'}: {', '.join(versions)}"]
    rows += [
        f"ceilings: {', '.join(rates) or 'not measured'}",
        "",
        f"{'stage':<16}{'outcome':<9}{'seconds':>8}  results",
    ]
    for record in found:
        if ": " not in record["name"]:
            counts = [f"{count} {outcome}" for outcome, count in record["facts"]["results"].items()]
            seconds = f"{record['facts']['seconds']:.1f}"
            rows.append(f"{record['name']:<16}{record['outcome']:<9}{seconds:>8}  {', '.join(counts) or 'none'}")
    rows += ["", f"{'timed':<72}{'median':>9}  quartiles"]
    for result in map(Result, found):
        if result.timed:
            rows.append(_timed(result))
        if launches := result.record["facts"].get("launches"):
            seconds = result.record["facts"]["kinds_s"]
            parts = (f"{kind}: {n:g} in {quantity(seconds[kind], SECONDS)}" for kind, n in launches.items())
            rows.append(f"    {sum(launches.values()):g} launches. {'; '.join(parts)}")
    if failed := [record for record in found if record["outcome"] == "failed"]:
        rows += ["", "failed", *(f"  {record['name']}: {record['reason']}" for record in failed)]
    return "\n".join(rows) + "\n"


def _timed(result: Result) -> str:
    low, middle, high = (quantity(value, SECONDS) for value in result.quartiles or ())
    told = [f"{low} to {high}"]
    told += [f"{figure(of['rate'])} {unit} ({percent(of['share'])})" for unit, of in result.record["shares"].items()]
    told += [f"{figure(result.images)} images/s"] if result.images else []
    told += [f"NOT VALID, {why}" for why in result.record["invalid"]]
    return f"{result.record['name']:<72}{middle:>9}  {', '.join(told)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description="Check and measure fastddpm on a GPU."
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=ROOT / "build" / "gpu-check", help="(%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=540, help="of the whole check, at most (%(default)g)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see that everything runs")
    planned = {stage.name: stage for stage in stages()}
    parser.add_argument("--only", metavar="STAGE", nargs="+", choices=planned, help=f"of: {', '.join(planned)}")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        parser.error(f"--seconds is {args.seconds:g}; want more than 0")
    try:
        begin(args.out, args.seconds, args.device)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what is known by then is shown
    try:
        check(args.out, args.seconds, args.device, [planned[name] for name in args.only or planned])
    finally:
        show(args.out)
    return int(any(line.get("outcome") == "failed" for line in gpu_records.read(args.out / LINES)))


def show(out: Path) -> None:
    """Write and print the table, and write the report."""
    lines = gpu_records.read(out / LINES)
    table = summary(lines)
    write(out / TABLE, table)
    if found := gpu_records.of(lines):
        write(out / REPORT, report.page(found))
    print(f"\n{table}\n{out}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
