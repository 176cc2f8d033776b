"""The folder of a training run: the state to resume from, the log and the loss curve."""

import io
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm.storage import plots
from fastddpm.storage.files import TEMPORARY, atomic, naming
from fastddpm.storage.fingerprint import differing
from fastddpm.train.options import TrainOptions, warmup_steps

STATE = "training.pt"
LOG = "log.jsonl"
CURVE = "loss.png"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
_LINE_START = '{"step": '  # every line of the log


@dataclass
class RunState:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        seconds: spent on them, by all processes that have continued the run so far.
        losses: of the steps since the last line of the log.
        setup: device, precision and so on of the latest steps. A resumed run keeps the precision.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    setup: dict[str, Any] = field(default_factory=dict)

    def to_file(self) -> dict[str, Any]:
        """The state under the names that it has on the disk."""
        return {_NAMES_ON_DISK.get(name, name): value for name, value in vars(self).items()}

    @classmethod
    def from_file(cls, held: Mapping[str, Any]) -> "RunState":
        """The inverse of `to_file`."""
        names = {on_disk: name for name, on_disk in _NAMES_ON_DISK.items()}
        return cls(**{names.get(name, name): value for name, value in held.items()})


_NAMES_ON_DISK = {"setup": "how"}  # since the first version


def run_identity(data: np.ndarray, labels: np.ndarray | None, options: TrainOptions) -> dict[str, Any]:
    """What must be the same when a run is resumed: images, labels and options, as JSON would return them."""
    identity = asdict(options) | {"schedule": options.schedule.to_config(), "warmup": warmup_steps(options)}
    for free in ("log_every", "save_every", "sample_every", "precision", "engine"):
        del identity[free]
    identity["data"] = {"shape": data.shape, "crc32": zlib.crc32(data.data)}
    if labels is not None:
        identity["labels"] = {"crc32": zlib.crc32(np.ascontiguousarray(labels, np.int64).data)}
    return json.loads(json.dumps(identity))


def load_state(out: Path, identity: Mapping[str, Any], parts: Mapping[str, Any]) -> RunState:
    """Load the state in `out` into the parts of a run.

    Args:
        identity: of the run that is to be resumed.
        parts: by name, objects with state_dict() and load_state_dict().
    Returns: the state; a new one if the folder holds none.
    Raises: ValueError: the folder holds another run, a damaged state, or a checkpoint that no run has written.
    """
    path = out / STATE
    if path.exists():
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
            state = RunState.from_file(held["progress"])
            changed = differing(held["run"], identity)
            if not changed:
                for name, part in parts.items():
                    part.load_state_dict(held[name])
        except OSError:  # the file may be intact
            raise
        except Exception as error:  # a damaged or hostile pickle may raise anything
            kind = type(error).__name__
            raise ValueError(f"{path} is damaged, or no run wrote it ({kind}); train into another folder") from error
        if changed:
            what = json.dumps(changed)[1:-1]
            raise ValueError(f"{out} holds a run that was started with {what}; use the same, or another folder")
        return state
    if held := [name for name in ("unet", "model_index.json", "config.json") if (out / name).exists()]:
        raise ValueError(f"{out} holds a checkpoint ({held[0]}) but no {STATE} to resume; train into another folder")
    if not _is_log(_log_lines(out)):
        raise ValueError(f"{out} holds a {LOG} that no run wrote; train into another folder")
    return RunState()


def save_state(out: Path, identity: Mapping[str, Any], parts: Mapping[str, Any], state: RunState) -> None:
    """Write the state that `load_state` reads."""
    held = {name: part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()  # torch.save reports a full disk in its own words
    torch.save({"progress": state.to_file(), "run": identity, **held}, buffer)
    with atomic(out / STATE) as file:
        file.write(buffer.getbuffer())


def saved_init(out: Path) -> str | None:
    """The checkpoint that the run in the folder started from, if the run has saved a checkpoint since."""
    if not all((out / name).exists() for name in (STATE, WEIGHTS)):
        return None
    try:
        return torch.load(out / STATE, map_location="cpu", weights_only=True, mmap=True)["run"].get("init")
    except Exception:  # `load_state` reports a damaged file
        return None


def remove_leftovers(out: Path, step: int) -> None:
    """Delete what an interrupted run left: temporary files, and lines of the log after `step`."""
    for folder in ("", "samples", "unet", "scheduler"):
        for leftover in (out / folder).glob(TEMPORARY):
            leftover.unlink(missing_ok=True)
    if (out / LOG).exists():
        lines = [line for line in _log_lines(out) if _logged_step(line) <= step]
        with atomic(out / LOG) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())


def append_to_log(out: Path, record: Mapping[str, float]) -> None:
    """Add a line to the log."""
    with naming(out / LOG), (out / LOG).open("a") as file:
        file.write(json.dumps(record) + "\n")


def draw_curve(out: Path) -> None:
    """Plot the loss over the steps, if the log has a line."""
    if lines := _log_lines(out):
        plots.loss_curve(map(json.loads, lines), out / CURVE)


def _log_lines(out: Path) -> list[str]:
    return (out / LOG).read_text(errors="replace").splitlines() if (out / LOG).exists() else []


def _is_log(lines: list[str]) -> bool:
    """Whether a run wrote these lines. The last one may be incomplete, if the run was killed."""
    whole = [_logged_step(line) < math.inf for line in lines]
    return all(whole) or (all(whole[:-1]) and _is_incomplete(lines[-1]))


def _is_incomplete(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return _LINE_START.startswith(line[: len(_LINE_START)])
    return False


def _logged_step(line: str) -> float:
    """The step of a line of the log; infinity if the line is incomplete or from another source."""
    try:
        record = json.loads(line)
        return record["step"] if type(record["step"]) is int and "loss" in record else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
