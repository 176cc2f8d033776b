"""What a run's folder holds beside the state: the checkpoint, the names of its classes, the log and the loss curve."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch import equal

from fastddpm import checkpoints
from fastddpm.checkpoints import Checkpoint
from fastddpm.checkpoints.medium import MEDIUM
from fastddpm.core.checks import is_real, is_whole
from fastddpm.processes.displays import is_torn
from fastddpm.storage import plots
from fastddpm.storage.files import atomic, check_regular, naming
from fastddpm.train.state import STATE

CLASSES = "classes.json"
LOG = "log.jsonl"
CURVE = "loss.png"
SAMPLES = "samples"
WRITTEN = (STATE, CLASSES, LOG, CURVE, SAMPLES, "unet", "scheduler", "model_index.json", MEDIUM)  # files and folders
_LINE_START = '{"step": '  # every line of the log


def check_is_new(out: Path) -> None:
    """Raises: ValueError: a folder without a state holds a checkpoint, class names or a log, which no run wrote."""
    if held := [name for name in ("unet", "model_index.json", "config.json", CLASSES) if (out / name).exists()]:
        raise ValueError(f"{out} holds a checkpoint ({held[0]}) but no {STATE} to resume; train into another folder")
    if not _is_log(_log_lines(out)):
        raise ValueError(f"{out} holds a {LOG} that no run wrote; train into another folder")


def prepare(out: Path, step: int) -> None:
    """Delete the lines of the log after `step`, which an interrupted run left, and those that are incomplete.

    Raises: ValueError: the log or the loss curve is a pipe or a device.
    """
    check_regular(out / CURVE)
    kept = "".join(f"{line}\n" for line in _log_lines(out) if _logged_step(line) <= step).encode()
    if (out / LOG).exists() and (out / LOG).read_bytes() != kept:
        with atomic(out / LOG) as file:
            file.write(kept)


def save_checkpoint(out: Path, checkpoint: Checkpoint, *, unless_same: bool = False) -> None:
    """Write the checkpoint and the names of its classes. Args: unless_same: write nothing if the folder holds them."""
    if unless_same and _holds(out, checkpoint):
        return
    if checkpoint.classes is not None:
        with atomic(out / CLASSES) as file:
            file.write((json.dumps(checkpoint.classes, indent=1) + "\n").encode())
    checkpoints.save(
        out,
        checkpoint.config,
        checkpoint.parameters,
        checkpoint.schedule,
        null_label=checkpoint.null_label,
        medium=checkpoint.medium,
    )


def _holds(out: Path, checkpoint: Checkpoint) -> bool:
    """Whether the folder holds this checkpoint, to the bit."""
    try:
        held = checkpoints.load(out)
    except (ValueError, OSError):  # damaged, or not written yet
        return False
    return (
        held.config == json.loads(json.dumps(checkpoint.config))
        and (held.schedule, held.classes) == (checkpoint.schedule, checkpoint.classes)
        and (held.null_label, held.medium) == (checkpoint.null_label, checkpoint.medium)
        and held.parameters.keys() == checkpoint.parameters.keys()
        and all(equal(held.parameters[name], value.cpu()) for name, value in checkpoint.parameters.items())
    )


def append_to_log(out: Path, record: Mapping[str, float]) -> None:
    """Add a line to the log."""
    with naming(out / LOG), (out / LOG).open("a") as file:
        file.write(json.dumps(record) + "\n")


def draw_curve(out: Path) -> None:
    """Plot the loss over the steps, if the log has a line."""
    if lines := _log_lines(out):
        plots.loss_curve(map(json.loads, lines), out / CURVE)


def _log_lines(out: Path) -> list[str]:
    if not (out / LOG).exists():
        return []
    return check_regular(out / LOG).read_text(encoding="utf-8", errors="replace").splitlines()


def _is_log(lines: list[str]) -> bool:
    """Whether a run wrote these lines. The last one may be incomplete, if the run was killed."""
    whole = [_logged_step(line) < math.inf for line in lines]
    return all(whole) or (all(whole[:-1]) and is_torn(lines[-1], _LINE_START))


def _logged_step(line: str) -> float:
    """The step of a line of the log; infinity if the line is incomplete or from another source."""
    try:
        record = json.loads(line)
        return record["step"] if is_whole(record["step"]) and is_real(record["loss"]) else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
