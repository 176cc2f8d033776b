"""The folder of a training run: the state that it is resumed from, its log, its loss curve."""

import io
import json
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastddpm.storage import plots
from fastddpm.storage.files import TEMPORARY, atomic, naming
from fastddpm.storage.fingerprint import differing

STATE = "training.pt"  # beside the checkpoint: what a resumed run needs
LOG = "log.jsonl"
CURVE = "loss.png"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
_BEGUN = '{"step": '  # the last line of a log that a kill left in its middle begins so, or as this does


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        seconds: spent on them, in all processes that were at it.
        losses: of the steps since the last line of the log.
        how: what the steps were last computed on, and how; the precision stays.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)


def resume(out: Path, run: Mapping[str, Any], parts: Mapping[str, Any]) -> Progress:
    """Load the state in `out` into the parts of a run; the log loses what was not saved, a kill's rests are removed.

    Args:
        run: what must be as it was, as JSON would hold it.
        parts: by name, what has state_dict() and load_state_dict().
    Returns: how far it is; a new Progress where there is none.
    Raises: ValueError: the folder holds another run, a state that is damaged, or a checkpoint of another origin.
    """
    path, done = out / STATE, Progress()
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            done, changed = Progress(**state["progress"]), differing(state["run"], run)
            if not changed:
                for name, part in parts.items():
                    part.load_state_dict(state[name])
        except OSError:  # perhaps it is whole
            raise
        except Exception as error:  # whatever a damaged or hostile pickle comes to
            kind = type(error).__name__
            raise ValueError(f"{path} is damaged, or not of a run ({kind}); train into another folder") from error
        if changed:
            raise ValueError(f"{out} holds a run with other {json.dumps(changed)[1:-1]}; give those, or another folder")
    elif held := [name for name in ("unet", "model_index.json", "config.json") if (out / name).exists()]:
        raise ValueError(f"{out} holds a checkpoint ({held[0]}) and no {STATE} to resume; train into another folder")
    elif not _of_a_run(_lines(out)):
        raise ValueError(f"{out} holds a {LOG} that is not of a run; train into another folder")
    return done


def begun_from(out: Path) -> str | None:
    """The checkpoint that the run in the folder started from, where it has come to one of its own, with its layout."""
    if not all((out / name).exists() for name in (STATE, WEIGHTS)):
        return None
    try:
        return torch.load(out / STATE, map_location="cpu", weights_only=True, mmap=True)["run"].get("init")
    except Exception:  # of what is damaged `resume` tells
        return None


@contextmanager
def put_off() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM in this block take effect at its end, so that what runs in it can finish and be saved.

    Yields: the signals that have arrived. One that arrives again takes effect at once, as does each where the program
        has a handler of its own, or in a thread that is not the main one.
    """
    caught: list[int] = []
    handlers: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, handlers[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                handlers[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for known, handler in handlers.items():
            signal.signal(known, handler)
    if caught:
        signal.raise_signal(caught[0])


def tidy(out: Path, step: int) -> None:
    """Forget what a kill left: lines of the log after `step`, temporary files."""
    for folder in ("", "samples", "unet", "scheduler"):
        for rest in (out / folder).glob(TEMPORARY):
            rest.unlink(missing_ok=True)
    if (out / LOG).exists():
        lines = [line for line in _lines(out) if _logged(line) <= step]
        with atomic(out / LOG) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())


def save(out: Path, run: Mapping[str, Any], parts: Mapping[str, Any], progress: Progress) -> None:
    """Write the state, to be resumed."""
    state = {"progress": vars(progress), "run": run, **{name: part.state_dict() for name, part in parts.items()}}
    buffer = io.BytesIO()  # torch has other words for a full disk
    torch.save(state, buffer)
    with atomic(out / STATE) as file:
        file.write(buffer.getbuffer())


def log(out: Path, record: Mapping[str, float]) -> None:
    with naming(out / LOG), (out / LOG).open("a") as file:
        file.write(json.dumps(record) + "\n")


def draw_curve(out: Path) -> None:
    """The loss over the steps, as a picture, once there is a line in the log."""
    if lines := _lines(out):
        plots.loss_curve(map(json.loads, lines), out / CURVE)


def _lines(out: Path) -> list[str]:
    return (out / LOG).read_text(errors="replace").splitlines() if (out / LOG).exists() else []


def _of_a_run(lines: list[str]) -> bool:
    """Whether these are the lines of a log, the last of which a kill may have torn."""
    whole = [_logged(line) < math.inf for line in lines]
    return all(whole) or (all(whole[:-1]) and _torn(lines[-1]))


def _torn(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return _BEGUN.startswith(line[: len(_BEGUN)])
    return False


def _logged(line: str) -> float:
    """The step of a line of the log; infinity for what a kill left of one, or what is none."""
    try:
        record = json.loads(line)
        return record["step"] if type(record["step"]) is int and "loss" in record else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
