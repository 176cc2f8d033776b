"""`fastddpm info`: versions, the machine and the defaults; with --kernels, what each kernel compiles to."""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from fastddpm._version import __version__
from fastddpm.cli import terminal
from fastddpm.cli.options import number_list
from fastddpm.storage.caches import user_cache
from fastddpm.storage.files import atomic

SUMMARY = "show versions, the machine and the defaults"
EPILOG = """
examples:
  fastddpm info                      device, precision and backend that the other commands use by default
  fastddpm info --kernels            registers, spills and memory accesses of each kernel
  fastddpm info --cc 80,90 --json    the same for these compute capabilities, as JSON; needs no GPU

Compiling the kernels takes about half a minute for each compute capability. The report is kept in
~/.cache/fastddpm/kernels, so that the next one comes at once.
"""

PACKAGES = ("triton", "numpy", "safetensors", "huggingface_hub", "diffusers")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernels", action="store_true", help="compile the kernels and add a report of the resources each one uses"
    )
    parser.add_argument(
        "--cc",
        type=number_list,
        metavar="I,J",
        help="compute capabilities for --kernels, which this option implies "
        "(default: those of the GPUs here, else 80,90,100,120)",
    )
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")


def run(args: argparse.Namespace) -> None:
    facts = machine_facts()
    with_kernels = args.kernels or args.cc is not None
    if args.json:
        if with_kernels:
            report = kernel_report(args.cc or (), "--json")
            facts["kernels"] = None if report is None else json.loads(report)
        print(json.dumps(facts, indent=2))
        return
    for group, name, text in _rows(facts):
        print(f"{group:<9} {name:<16} {text}")
    if with_kernels:
        sys.stdout.flush()  # before the kernels are compiled
        print(
            "\n" + (kernel_report(args.cc or ()) or "no kernels: Triton is not installed, so torch runs the operations")
        )


def machine_facts() -> dict[str, Any]:
    """What decides how fastddpm runs here: versions, the machine, and the defaults of the commands."""
    import torch

    from fastddpm import ops
    from fastddpm.core.precision import Compute
    from fastddpm.storage.fingerprint import installed

    compute = Compute.resolve()
    versions: dict[str, str | None] = {
        "fastddpm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions |= {name: installed(name) for name in PACKAGES}
    machine = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        machine[f"cuda:{i}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    default = {
        "device": compute.device.type,
        "precision": compute.precision,
        "backend": ops.backend(compute.device),
        "backend_reason": ops.backend_reason(compute.device),
    }
    return {"version": versions, "machine": machine, "default": default}


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(group, name, text) of each line. Neighbouring GPUs that are alike share a line."""
    for name, version in facts["version"].items():
        yield "version", name, version or "not installed"
    machine = dict(facts["machine"])
    gpus = [(name, machine.pop(name)) for name in list(machine) if name.startswith("cuda:")]
    machine["bf16"] = "computed natively by the CPU" if machine["bf16"] else "emulated by the CPU"
    for name, value in machine.items():
        yield "machine", name, str(value)
    for description, alike in groupby(gpus, key=lambda gpu: gpu[1]):
        names = [name for name, _ in alike]
        last = f"-{names[-1].removeprefix('cuda:')}" if len(names) > 1 else ""
        yield "machine", names[0] + last, description
    default = facts["default"]
    yield "default", "device", default["device"]
    yield "default", "precision", default["precision"]
    yield "default", "backend", f"{default['backend']} ({default['backend_reason']})"


def kernel_report(capabilities: Sequence[int], *options: str) -> str | None:
    """What each kernel compiles to; None without Triton.

    A new process compiles the kernels, because in this one Triton may be set to interpret them. Its report is kept in
    the user's cache.

    Args:
        capabilities: compute capabilities; empty: those of the GPUs here, or without a GPU the report's default.
        options: of `python -m fastddpm.kernels.report`.
    Raises: RuntimeError: the report failed; the message has the reason.
    """
    import torch

    if find_spec("triton") is None:
        return None
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    wanted = capabilities or sorted({10 * major + minor for major, minor in gpus if major >= 8})
    arguments = [*options, *(["--cc", *map(str, wanted)] if wanted else [])]
    kept = _kept_report(arguments)
    if kept is not None:
        with suppress(OSError, UnicodeDecodeError):
            return kept.read_text("utf-8")
    terminal.tell(f"compiling the kernels: about {30 * (len(wanted) or 4)} seconds on one core")
    report = _compiled_report(arguments)
    if kept is not None:
        with suppress(OSError):  # no cache, then
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic(kept) as file:
                file.write(report.encode())
    return report


def _kept_report(arguments: Sequence[str]) -> Path | None:
    """The file of the user's cache for the report of these kernels by this Triton; None for a user without a home."""
    from fastddpm.storage.fingerprint import installed

    folder, kernels = user_cache("kernels"), find_spec("fastddpm.kernels")
    if folder is None or kernels is None or kernels.origin is None:
        return None
    digest = hashlib.sha256(json.dumps([installed("triton"), *arguments]).encode())
    for path in sorted(Path(kernels.origin).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return folder / f"{digest.hexdigest()[:32]}.txt"


def _compiled_report(arguments: Sequence[str]) -> str:
    command = [sys.executable, "-m", "fastddpm.kernels.report", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = re.findall(r"^[\w.]+: .+", done.stderr, re.MULTILINE)
        raise RuntimeError(f"the report on the kernels failed: {' '.join(reasons[-1:])}")
    return done.stdout.rstrip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
