"""How the progress of a job is shown: as bars on a terminal, as plain lines elsewhere, and as JSON lines in a file."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, AnyStr

from fastddpm.storage.files import check_writable, naming

LOG_EVERY = 10.0  # seconds between JSON lines
LONGEST_LINE = 1 << 24  # bytes: a summary of ten thousand processes
_LINE_START = b'{"time": '  # of a summary
_KEYS = {"time", "seconds", "images", "of", "drawn", "images_per_s", "steps_per_s", "eta_s", "ranks"}
PRINT_EVERY = 30.0  # seconds between plain lines


class Stderr:
    """sys.stderr for what a job can do without: if its reader has gone or its disk is full, the work goes on."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # ValueError: it was closed; AttributeError: it is None
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return sys.stderr.isatty()
        return False

    def __getattr__(self, name: str) -> Any:  # encoding, fileno
        return getattr(sys.stderr, name)


class Bars:
    """Bars on a terminal: one for the job, and one for each of several processes.

    Args: size: the number of processes.
    """

    def __init__(self, size: int):
        from tqdm import tqdm

        names = ["samples", *(f"process {rank}" for rank in range(size) if size > 1)]
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self.bars = [
            tqdm(total=1, desc=name, position=i, bar_format=form, leave=not i, file=Stderr(), dynamic_ncols=True)
            for i, name in enumerate(names)
        ]

    def update(self, summary: Mapping[str, Any], last: bool) -> None:
        """Show a summary of `JobProgress`; the last one closes the bars."""
        for bar, part in zip(self.bars, [summary, *summary["ranks"]], strict=False):
            bar.n, bar.total = int(part["drawn"]), part["of"]
            bar.set_postfix_str(_rates(part))
        if last:
            for bar in reversed(self.bars):
                bar.close()


class Lines:
    """A plain line every PRINT_EVERY seconds, where there is no terminal. The first comes at `start`."""

    def __init__(self, start: float):
        self.next = start

    def update(self, summary: Mapping[str, Any], last: bool) -> None:
        """Print a summary of `JobProgress` if a line is due; the last one always."""
        if not last and time.monotonic() < self.next:
            return
        self.next = time.monotonic() + PRINT_EVERY
        parts = [f"{summary['images']} of {summary['of']} samples, {_rates(summary)}"]
        if len(summary["ranks"]) > 1:
            for rank in summary["ranks"]:
                parts.append(f"process {rank['rank']}: {rank['images']} of {rank['of']}, {_rates(rank)}")
        print("; ".join(parts), file=Stderr(), flush=True)


class JsonLog:
    """Appends a JSON line to a file every LOG_EVERY seconds. The file must be one that `check_log` accepts."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.next = -math.inf
        self.pipe: int | None = None  # stays open: to its reader, closing it would be the end

    def update(self, summary: Mapping[str, Any], last: bool) -> None:
        """Write a summary of `JobProgress` if a line is due; the last one always."""
        if not last and time.monotonic() < self.next:
            return
        with naming(self.path):
            if self.next == -math.inf and self.path.is_file():
                os.truncate(self.path, _check_lines(self.path))  # a process that was killed may have torn the last line
            try:
                self._append(json.dumps(summary).encode() + b"\n")
            finally:
                if last and self.pipe is not None:
                    os.close(self.pipe)
                    self.pipe = None
        self.next = time.monotonic() + LOG_EVERY

    def _append(self, line: bytes) -> None:
        if self.pipe is None and self.path.is_fifo():
            self.pipe = _open_pipe(self.path)
        if self.pipe is not None:
            os.write(self.pipe, line)
        else:
            with self.path.open("ab") as file:
                file.write(line)


def _open_pipe(path: Path) -> int:
    """A pipe that is open for writing. Raises: ValueError: it has no reader, for which opening it would wait."""
    try:
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise ValueError(f"nobody reads the pipe {path}; start its reader first, or name a file") from error
        raise
    os.set_blocking(pipe, True)
    return pipe


def check_log(path: str | os.PathLike[str]) -> None:
    """Check that a `JsonLog` can be written to path.

    Raises: ValueError: it cannot be written, or it is a file that is not such a log.
    """
    if check_writable(path).is_file():
        _check_lines(Path(path))


def _check_lines(path: Path) -> int:
    """The size of the complete lines of a log. Raises: ValueError: it is another file."""
    size = 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            torn = not line.endswith(b"\n")
            if not _is_summary(line) and not (torn and is_torn(line, _LINE_START)):
                what = "is not a log of a job's progress"
                raise ValueError(
                    f"{path} {what}: its line {line[:40]!r} is no part of one; name a new file for the log"
                )
            size += 0 if torn else len(line)
    return size


def is_torn(line: AnyStr, start: AnyStr) -> bool:
    """Whether a line can be the beginning of a JSON line that begins with `start`, and is not a whole value itself."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return start.startswith(line[: len(start)])
    return False


def _is_summary(line: bytes) -> bool:
    """Whether a line was written by `JsonLog`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.keys() >= _KEYS


def _rates(part: Mapping[str, Any]) -> str:
    from tqdm import tqdm

    eta = "?" if part["eta_s"] is None else tqdm.format_interval(part["eta_s"])
    return f"{part['images_per_s']:.3g} images/s, {part['steps_per_s']:.3g} steps/s, ETA {eta}"
