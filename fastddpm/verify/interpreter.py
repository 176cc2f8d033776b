"""The rungs of the kernels in Triton's interpreter, which takes a process: Triton chooses it when it is imported."""

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict

import torch

from fastddpm import ops
from fastddpm.core.schedule import Schedule
from fastddpm.verify import rungs
from fastddpm.verify.accuracy import Record
from fastddpm.verify.case import INTERPRETED, Case


def interpreted_records(schedule: Schedule, damage: str | None) -> list[Record]:
    """Climb the rungs of the kernels in a process whose Triton interprets. If it fails, all of them have failed."""
    arguments = json.dumps({"schedule": schedule.to_config(), "damage": damage})
    # not -m, which would look for modules in the current folder first
    code = "import sys; del sys.path[0]; from fastddpm.verify.interpreter import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", code],
        input=arguments,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        note = process.stderr.strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        return [Record(name, INTERPRETED, math.nan, 0, note) for name in rungs.OF_KERNELS]
    return [Record(**record) for record in json.loads(process.stdout)]


def main() -> None:
    """Run in that process: read arguments as JSON from stdin, and print the records as JSON."""
    arguments = json.load(sys.stdin)
    records = climb_interpreted(Schedule.from_config(arguments["schedule"]), arguments["damage"])
    print(json.dumps([asdict(record) for record in records]))


def climb_interpreted(schedule: Schedule, damage: str | None) -> list[Record]:
    """Climb the rungs of the kernels in this process, in which TRITON_INTERPRET is set."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return [Record(name, INTERPRETED, note=f"no Triton: {error}") for name in rungs.OF_KERNELS]
    case = Case(schedule, torch.device("cpu"), INTERPRETED)
    with ops.forced_backend("triton"):
        return [record for name in rungs.OF_KERNELS for record in rungs.climb(name, case, name == damage)]
