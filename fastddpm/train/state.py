"""The state that a training run is resumed from: what it holds, how it is saved, and all that is checked in loading."""

import io
import json
import shlex
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.checkpoints.reading import load_archive
from fastddpm.core.checks import real, shown, whole
from fastddpm.storage.files import atomic, check_regular
from fastddpm.storage.fingerprint import differing
from fastddpm.storage.shards import in_short
from fastddpm.train.options import TrainOptions, warmup_steps
from fastddpm.train.updates import learning_rate_at

STATE = "training.pt"
_LENGTH = ("steps", "warmup")  # the options that decide the learning rate of a step, beside its peak
_CHECKSUM = b"fastddpm crc32 "  # stands after the archive of torch.save, with eight digits; older versions wrote none
_ADDED = {"label_dropout": 0.0, "frame": 1, "kernel_size": 5}  # options that older versions lacked, and what they did
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


class LongerRunError(ValueError):
    """A run that has more steps than the one in the folder, but not the same learning rates.

    Attributes:
        more: how many steps more.
    """

    def __init__(self, message: str, more: int):
        super().__init__(message)
        self.more = more


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
        """The inverse of `to_file`. Raises: ValueError: a value is of another kind."""
        return cls(
            whole("its step", held["step"], 0),
            real("its seconds", held["seconds"], 0),
            [real("a loss", loss) for loss in held["losses"]],
            _mapping("its how", held["how"]),
        )


_NAMES_ON_DISK = {"setup": "how"}  # since the first version


def run_identity(
    data: np.ndarray, labels: np.ndarray | None, classes: Sequence[str] | None, options: TrainOptions
) -> dict[str, Any]:
    """What must be the same when a run is resumed: images, labels and options, as JSON would return them."""
    identity = asdict(options) | {"schedule": options.schedule.to_config(), "warmup": warmup_steps(options)}
    for free in ("log_every", "save_every", "sample_every", "precision", "engine"):
        del identity[free]
    identity["data"] = {"shape": data.shape, "crc32": zlib.crc32(data.data)}
    if labels is not None:
        identity["labels"] = {"crc32": zlib.crc32(np.ascontiguousarray(labels, np.int64).data)}
    if classes is not None:
        identity["classes"] = list(classes)
    return json.loads(json.dumps(identity))


def load_state(
    out: Path, options: TrainOptions, identity: Mapping[str, Any], parts: Mapping[str, Any]
) -> RunState | None:
    """Load the state in `out` into the parts of a run.

    Args:
        options: of the run that is to be resumed; identity: of the same.
        parts: "net" and "ema", two networks, and "optimizer".
    Returns: the state; None if the folder has none.
    Raises: ValueError: the folder holds another run, or a damaged state; then no part is changed.
    """
    path = out / STATE
    if not path.exists():
        return None
    with _reported(path):
        held = _read(path)
        state, before = RunState.from_file(held["progress"]), _mapping("its run", held["run"])
        before = _ADDED | before  # runs of older versions have neither these nor classes
        if "classes" not in before:
            identity = {name: value for name, value in identity.items() if name != "classes"}
        changed = differing(before, identity)
        text = in_short(changed)
        only_length = changed.keys() <= set(_LENGTH)
        if only_length and _has_same_rates(state.step, before, options):
            _load_parts(held, parts, state.step)
            return state
    if only_length and options.steps > before["steps"]:
        raise _longer_run(out, options.steps, before["steps"], state.step)
    raise ValueError(f"{out} holds a run that was started with {text}; use the same, or another folder")


def save_state(out: Path, identity: Mapping[str, Any], parts: Mapping[str, Any], state: RunState) -> None:
    """Write the state that `load_state` reads."""
    held = {name: part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()  # torch.save reports a full disk in its own words
    torch.save({"progress": state.to_file(), "run": identity, **held}, buffer)
    with atomic(out / STATE) as file:
        file.write(buffer.getbuffer())
        file.write(_checksum(buffer.getbuffer()))


def saved_init(out: Path) -> str | None:
    """The checkpoint that the run in a folder started from, if the folder has a state; None if it started from none."""
    try:
        return _read(out / STATE)["run"].get("init")
    except Exception:  # `load_state` reports a damaged file
        return None


def _read(path: Path) -> dict[str, Any]:
    """What a state holds, with tensors on the CPU."""
    content = check_regular(path).read_bytes()
    end = len(content) - len(_checksum(b""))
    if content[end:].startswith(_CHECKSUM) and content[end:] != _checksum(memoryview(content)[:end]):
        raise ValueError("its checksum is wrong")
    file = io.BytesIO(content)
    zipfile.ZipFile(file).close()  # torch.load reads older formats too, which have no checksums
    return _mapping("it", load_archive(file))


def _checksum(content: bytes | memoryview) -> bytes:
    """The end of a state, which shows whether a bit of it has changed; torch.load does not."""
    return _CHECKSUM + f"{zlib.crc32(content):08x}".encode()


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """In this block, errors say that the file is damaged. A damaged or hostile file may raise anything."""
    try:
        yield
    except OSError:  # the file may be intact
        raise
    except Exception as error:
        # the words of pickle and torch may advise what is not safe
        why = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(
            f"{path} is damaged, or no run wrote it ({why}); train into another folder, "
            f"from the checkpoint beside it if that is whole (--init {shlex.quote(str(path.parent))})"
        ) from error


def _mapping(name: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}; want a dictionary")
    return value


def _load_parts(held: Mapping[str, Any], parts: Mapping[str, Any], step: int) -> None:
    """Load tensors into the networks and the optimiser after all of them were checked."""
    optimizer = parts["optimizer"]
    parameters = list(optimizer.param_groups[0]["params"])
    wanted = {}
    for i, parameter in enumerate(parameters if step else []):
        like = dict.fromkeys(_MOMENTS, parameter) | {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        wanted[i] = {name: torch.empty_like(value, device="cpu") for name, value in like.items()}
    moments = _mapping("the optimizer's state", _mapping("its optimizer", held["optimizer"])["state"])
    _check_names("optimizer", moments, wanted)
    for i, like in wanted.items():
        _check_tensors(f"optimizer {i}", moments[i], like)
        for name, value in like.items():
            value.copy_(moments[i][name])  # into memory of the parameter's layout
    for name in ("net", "ema"):
        _check_tensors(name, held[name], parts[name].state_dict())
    for name in ("net", "ema"):
        parts[name].load_state_dict(held[name])
    # its other options are those of the run, or set in each step
    optimizer.load_state_dict({"state": wanted, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_names(part: str, held: Any, wanted: Mapping[Any, Any]) -> None:
    if missing := wanted.keys() - _mapping(part, held).keys():
        raise ValueError(f"{part} lacks {min(missing)}")
    if unknown := held.keys() - wanted.keys():
        raise ValueError(f"{part} has {shown(unknown.pop())}, which is not of this network")


def _check_tensors(part: str, held: Any, wanted: Mapping[str, Tensor]) -> None:
    """Raises: ValueError: held has other names than wanted, or something else than a plain tensor like it."""
    _check_names(part, held, wanted)
    for name, like in wanted.items():
        value = held[name]
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or (value.shape, value.dtype) != (like.shape, like.dtype):
            got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{part} has {got} as {name}; want a plain tensor {tuple(like.shape)} {like.dtype}")


def _has_same_rates(done: int, before: Mapping[str, Any], options: TrainOptions) -> bool:
    """Whether the steps done are those of a run with these options: another length may begin with the same rates."""
    steps, warmup = whole("its steps", before["steps"], done), whole("its warmup", before["warmup"], 0)
    earlier = replace(options, steps=steps, warmup=warmup)
    return done <= options.steps and all(
        learning_rate_at(k, earlier) == learning_rate_at(k, options) for k in range(done)
    )


def _longer_run(out: Path, steps: int, before: int, done: int) -> LongerRunError:
    more = steps - before
    finish = f"finish it with --steps {before}, then " if done < before else ""
    return LongerRunError(
        f"{out} holds a run of {before} steps, and the learning rates of its steps follow from that number, so that "
        f"{steps} steps are another run; to train on, {finish}start a run of {more} steps from it with --init, in "
        "another folder",
        more,
    )
