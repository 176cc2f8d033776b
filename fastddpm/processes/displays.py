"""How the progress of a job is shown: as bars on a terminal, as plain lines elsewhere, and as JSON lines in a file."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastddpm.storage.files import naming

LOG_EVERY = 10.0  # seconds between JSON lines
PRINT_EVERY = 30.0  # seconds between plain lines


class Bars:
    """Bars on a terminal: one for the job, and one for each of several processes.

    Args: size: the number of processes.
    """

    def __init__(self, size: int):
        from tqdm import tqdm

        names = ["samples", *(f"process {rank}" for rank in range(size) if size > 1)]
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self.bars = [
            tqdm(total=1, desc=name, position=i, bar_format=form, leave=not i, file=sys.stderr)
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
        print("; ".join(parts), file=sys.stderr, flush=True)


class JsonLog:
    """Appends a JSON line to a file every LOG_EVERY seconds."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.next = -math.inf

    def update(self, summary: Mapping[str, Any], last: bool) -> None:
        """Write a summary of `JobProgress` if a line is due; the last one always."""
        if not last and time.monotonic() < self.next:
            return
        self.next = time.monotonic() + LOG_EVERY
        with naming(self.path), self.path.open("ab") as file:
            # a process that was killed may have left an incomplete line
            separator = b"\n" * (self.path.is_file() and not _ends_with_newline(self.path))
            file.write(separator + json.dumps(summary).encode() + b"\n")


def _ends_with_newline(path: Path) -> bool:
    """Whether a file is empty or ends with a newline."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    return True


def _rates(part: Mapping[str, Any]) -> str:
    from tqdm import tqdm

    eta = "?" if part["eta_s"] is None else tqdm.format_interval(part["eta_s"])
    return f"{part['images_per_s']:.3g} images/s, {part['steps_per_s']:.3g} steps/s, ETA {eta}"
