"""`fastddpm verify`: is what runs on this machine the same function as the reference? Climbs the ladder of `rungs`.

The kernels run compiled on a GPU. On a CPU torch's functions take their place, and Triton, where it is installed,
interprets the kernels in a process of its own: it must be told so before it is first imported.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import cast
from unittest import mock

import torch

from fastddpm import ops
from fastddpm.core.schedule import Schedule
from fastddpm.evaluate.likelihood import check_returned
from fastddpm.networks.unet2d import UNet2D
from fastddpm.sampling.sampler import Sampler
from fastddpm.verify.rungs import INTERPRETED, OF_KERNELS, OF_SAMPLING, RUNGS, Case, Checkpoint, Record


def verify(
    source: str | os.PathLike[str] | None = None,
    *,
    variant: str | None = None,
    device: torch.device | str | None = None,
    steps: int | None = None,
    damage: str | None = None,
    progress: bool = True,
) -> list[Record]:
    """Climb the ladder with a checkpoint: a minute or two on two cores with the model in the package.

    With learned variances, of which `Sampler` draws no samples, the rungs of sampling are skipped.

    Args:
        source: folder or hub id, as `Sampler.from_pretrained` takes it; None: the model in the package.
        variant: of the weights, such as "fp16".
        device: "cuda" where there is one, else "cpu".
        steps: of the trajectory; None: all T.
        damage: a rung, one of RUNGS, whose fast side shall be wrong.
        progress: show a bar.
    Returns: the comparisons in order; `table` makes text of them.
    Raises: ValueError: an argument is not as above, the checkpoint cannot be read, its network does not go with its
        variance_type, or the rung to be damaged is skipped.
    """
    if damage is not None and damage not in RUNGS:
        raise ValueError(f"damage is {damage!r}; want one of the rungs {', '.join(RUNGS)}")
    sampler = Sampler.from_pretrained(source, variant=variant, device=device, precision="fp32")
    schedule, device, net = sampler.schedule, sampler.device, cast(UNet2D, sampler.model)
    check_returned(schedule, sampler.shape[0], net.config["out_channels"])
    learned = schedule.variance_type if schedule.learns_variance else None
    if learned:
        schedule = replace(schedule, variance_type="fixed_small")  # all but the variance is the same
    schedule.table(steps)  # a wrong number of steps is refused at once
    kernels = "the kernel" if ops.backend(device) == "triton" else "torch"
    case = Checkpoint(schedule, device, kernels, net, sampler.shape, steps, progress)
    records: list[Record] = []
    interpreted: list[Record] = []
    for name in case.bar(RUNGS, "verify"):
        if learned and name in OF_SAMPLING:
            note = f"sampling with variance_type {learned!r} is not supported"
            records.append(Record(name, "samples with the reference's", note=note))
            continue
        records += _climb(name, case, name == damage)
        if name in OF_KERNELS and device.type == "cpu":
            interpreted = interpreted or _interpreted(schedule, damage)
            records += [record for record in interpreted if record.rung == name]
    damaged = [record for record in records if record.rung == damage]
    if damaged and all(record.verdict == "skipped" for record in damaged):
        raise ValueError(f"damage is {damage!r}, but that rung is skipped: {damaged[0].note}; choose another")
    return records


def table(records: Sequence[Record]) -> str:
    """The comparisons as text, a line each; then the errors along the trajectories, and the verdict."""
    lines = [("rung", "compared", "error", "bound", "", "")]
    for r in records:
        error, bound = ("", "") if r.error is None or r.bound is None else (f"{r.error:.3g}", f"{r.bound:.3g}")
        if r.error is not None and r.bound == 0:
            error, bound = f"{r.error:g} differ", "equal"
        lines.append((r.rung, r.compared, error, bound, r.verdict, r.note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for r in records:
        if r.steps:
            shown = sorted({round(i * (len(r.steps) - 1) / 10) for i in range(11)})
            along = ", ".join("{}: {:.1e} ({:.1e})".format(*r.steps[i]) for i in shown)
            text += [f"{r.compared.partition(' with ')[0]}, rms error after t (plain torch's):", f"  {along}"]
    judged = [r for r in records if r.verdict != "skipped"]
    failed = [r.rung for r in judged if r.verdict == "FAIL"]
    if failed:
        text.append(f"FAILED: {len(failed)} of {len(judged)} comparisons, in {', '.join(dict.fromkeys(failed))}")
    else:
        text.append(f"passed: all {len(judged)} comparisons; {len(records) - len(judged)} skipped")
    return "\n".join(text)


def _climb(name: str, case: Case, damage: bool) -> list[Record]:
    """The comparisons of a rung; what breaks has failed."""
    records: list[Record] = []
    try:
        with torch.no_grad():
            for record in RUNGS[name](case, damage):
                records.append(record)  # one by one: those before an error count
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        records.append(Record(name, "could not be compared", math.nan, 0, why))
    return records


def _interpreted(schedule: Schedule, damage: str | None) -> list[Record]:
    """The rungs of the kernels as Triton interprets them."""
    given = json.dumps({"schedule": schedule.to_config(), "damage": damage})
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    # not -m, which would look for modules in the current folder first
    run = [
        sys.executable,
        "-c",
        "import sys; del sys.path[0]; from fastddpm.verify.ladder import _interpret; _interpret()",
    ]
    done = subprocess.run(run, input=given, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        return [Record(name, INTERPRETED, math.nan, 0, why) for name in OF_KERNELS]
    return [Record(**record) for record in json.loads(done.stdout)]


def _interpret() -> None:
    """What that process does: arguments as JSON on stdin, records on stdout."""
    given = json.load(sys.stdin)
    records = _climb_interpreted(Schedule.from_config(given["schedule"]), given["damage"])
    print(json.dumps([asdict(record) for record in records]))


def _climb_interpreted(schedule: Schedule, damage: str | None) -> list[Record]:
    """The rungs of the kernels where TRITON_INTERPRET is set."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return [Record(name, INTERPRETED, note=f"no Triton: {error}") for name in OF_KERNELS]
    case = Case(schedule, torch.device("cpu"), INTERPRETED)
    with mock.patch.object(ops, "backend", return_value="triton"):
        return [record for name in OF_KERNELS for record in _climb(name, case, name == damage)]
