"""How a job of several processes gets on, of each and in all: as bars or plain lines, and as JSON lines."""

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from fastddpm.processes.distributed import AgreedError, Ranks, one_line
from fastddpm.storage.files import naming

BEAT = 0.5  # seconds from one look at the processes to the next
SILENT = 600  # such looks without a sign of life: a process is lost
ANSWER = 60  # seconds that the first process may take to answer another
LOG_EVERY = 10.0  # seconds from one JSON line to the next
PRINT_EVERY = 30.0  # and from one plain line to the next
_FAILED = "failed"


class LostError(AgreedError):
    """The first process does not answer any more: perhaps it has ended because all was done."""


@dataclass
class Count:
    """What one process has done of its part.

    Attributes:
        rank: of the process.
        of: samples in its part.
        images: of them on the disk.
        steps: of the network; image_steps: the same, each counted as often as there were samples in its batch.
        seconds: from the beginning to its latest step.
        state: "running", "done", or why it ended.
        beat: signs of life.
    """

    rank: int
    of: int
    images: int = 0
    steps: int = 0
    image_steps: int = 0
    seconds: float = 0.0
    state: str = "running"
    beat: int = 0


class Progress:
    """Gathers the counts of all processes; the first of them shows and logs them. Errors end all.

    Args:
        group: the processes, each of which makes one of these at the same time.
        part: samples this process is to draw.
        total: samples there are to be in the end, of which `before` are there already.
        steps: of a sample.
        show: draw bars on a terminal, or print a line now and then.
        json_log: a file to append a JSON line to every so often, and at the end.
        stopped: what signals have raised.
    """

    def __init__(
        self,
        group: Ranks,
        part: int,
        *,
        total: int,
        before: int,
        steps: int,
        show: bool = True,
        json_log: str | os.PathLike[str] | None = None,
        stopped: Sequence[BaseException] = (),
    ):
        self.group, self.stopped = group, stopped
        self.total, self.before, self.steps = total, before, steps
        self.count, self.began = Count(group.rank, part), time.monotonic()
        self.failure: Exception | None = None
        self.board = _board(group)
        self.heard = [(0, 0)] * group.size  # of each process: the latest sign of life, and looks since then
        self._post()
        group.gather(None)  # all have posted
        self.show: _Bars | _Lines | None = None
        self.log = None
        if group.rank == 0:
            self.show = None if not show else _Bars(self) if sys.stderr.isatty() else _Lines(self)
            self.log = None if json_log is None else _Log(json_log)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def stepped(self, steps: int, samples: int) -> None:
        """The network has taken so many more steps with a batch. Raises: AgreedError: another process has failed."""
        self.check()
        self.count.steps += steps
        self.count.image_steps += steps * samples
        self.count.seconds = time.monotonic() - self.began

    def stored(self, samples: int) -> None:
        """So many more samples are on the disk."""
        self.count.images += samples

    def fail(self, error: Exception) -> None:
        """Have the next `check` raise this."""
        self.failure = error

    def check(self) -> None:
        """Raise what failed in another process or thread, or what a signal raised where Python ignores that."""
        for stopped in self.stopped:
            raise stopped
        if self.failure is not None:
            raise self.failure

    def look(self) -> None:
        """Look whether another process has failed by now. Raises: AgreedError: it has; LostError."""
        try:
            self._post()
            failed = self.board.get(_FAILED).decode() if self.board.check([_FAILED]) else None
        except RuntimeError as error:
            raise LostError("process 0 was lost") from error
        if failed is not None:
            raise AgreedError(failed)

    def done(self) -> None:
        """This process has done its part."""
        self.count.state = "done"
        self._post()

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(10 * BEAT)
        if self._thread.is_alive():  # it waits for the board of a process that is silent
            return
        if error is not None and not isinstance(error, AgreedError):
            stopped = isinstance(error, KeyboardInterrupt)
            self.count.state = "stopped" if stopped else one_line(error)
            with suppress(RuntimeError):  # the first process has gone
                self._post()
                self.board.set(_FAILED, f"process {self.group.rank}: {self.count.state}")
        if self.group.rank == 0:
            with suppress(OSError) if error is not None else nullcontext():  # that error is told, not another one
                self._tell(self._counts(), last=True)
            if error is not None and self.group.size > 1:
                time.sleep(2 * BEAT)  # the board ends with this process: the others shall have read why

    def _run(self) -> None:
        while self.failure is None and not self._ended.wait(BEAT):
            try:
                self.look()
                if self.group.rank == 0:
                    counts = self._counts()
                    self._tell(counts)
                    self._listen(counts)
            except Exception as error:
                self.failure = error

    def _post(self) -> None:
        self.count.beat += 1
        self.board.set(str(self.group.rank), json.dumps(asdict(self.count)))

    def _tell(self, counts: Sequence[Count], *, last: bool = False) -> None:
        summary = self.summary(counts)
        if self.show is not None:
            self.show.tell(summary, last)
        if self.log is not None:
            self.log.tell(summary, last)

    def _counts(self) -> list[Count]:
        return [Count(**json.loads(self.board.get(str(rank)))) for rank in range(self.group.size)]

    def _listen(self, counts: Sequence[Count]) -> None:
        """Tell all if a process has given no sign of life for a long time."""
        for count in counts:
            beat, looks = self.heard[count.rank]
            self.heard[count.rank] = (beat, looks + 1) if count.beat == beat else (count.beat, 0)
            if looks > SILENT:
                what = f"process {count.rank} has not been heard of for {SILENT * BEAT:.0f} seconds"
                self.board.set(_FAILED, what)

    def summary(self, counts: Sequence[Count]) -> dict[str, Any]:
        """What there is to tell, as JSON has it."""
        ranks = []
        for count in counts:
            rate = count.image_steps / count.seconds if count.seconds else 0.0
            left = count.of * self.steps - count.image_steps
            ranks.append(
                {
                    **{name: getattr(count, name) for name in ("rank", "state", "images", "of")},
                    "drawn": min(count.of, count.image_steps / self.steps),
                    "images_per_s": rate / self.steps,
                    "steps_per_s": count.steps / count.seconds if count.seconds else 0.0,
                    "eta_s": 0.0 if left <= 0 else left / rate if rate else None,
                }
            )
        etas = [rank["eta_s"] for rank in ranks]
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.began, 3),
            "images": self.before + sum(count.images for count in counts),
            "of": self.total,
            "drawn": self.before + sum(rank["drawn"] for rank in ranks),
            "images_per_s": sum(rank["images_per_s"] for rank in ranks),
            "steps_per_s": sum(rank["steps_per_s"] for rank in ranks),
            "eta_s": None if None in etas else max(etas),
            "ranks": ranks,
        }


class _Bars:
    """On a terminal: a bar for all, and one for each process of several."""

    def __init__(self, progress: Progress):
        from tqdm import tqdm

        size = progress.group.size
        names = ["samples", *(f"process {rank}" for rank in range(size) if size > 1)]
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self.bars = [
            tqdm(total=1, desc=name, position=i, bar_format=form, leave=not i, file=sys.stderr)
            for i, name in enumerate(names)
        ]

    def tell(self, summary: Mapping[str, Any], last: bool) -> None:
        for bar, told in zip(self.bars, [summary, *summary["ranks"]], strict=False):
            bar.n, bar.total = int(told["drawn"]), told["of"]
            bar.set_postfix_str(_rates(told))
        if last:
            for bar in reversed(self.bars):
                bar.close()


class _Lines:
    """Elsewhere: a line now and then."""

    def __init__(self, progress: Progress):
        self.next = progress.began

    def tell(self, summary: Mapping[str, Any], last: bool) -> None:
        if not last and time.monotonic() < self.next:
            return
        self.next = time.monotonic() + PRINT_EVERY
        parts = [f"{summary['images']} of {summary['of']} samples, {_rates(summary)}"]
        if len(summary["ranks"]) > 1:
            for rank in summary["ranks"]:
                parts.append(f"process {rank['rank']}: {rank['images']} of {rank['of']}, {_rates(rank)}")
        print("; ".join(parts), file=sys.stderr, flush=True)


class _Log:
    """A file of JSON lines, added to what it holds."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.next = Path(path), -math.inf

    def tell(self, summary: Mapping[str, Any], last: bool) -> None:
        if not last and time.monotonic() < self.next:
            return
        self.next = time.monotonic() + LOG_EVERY
        with naming(self.path), self.path.open("ab") as file:
            torn = b"\n" * (self.path.is_file() and not _ends_a_line(self.path))  # of a process that was killed
            file.write(torn + json.dumps(summary).encode() + b"\n")


def _ends_a_line(path: Path) -> bool:
    """Whether a file is empty, or ends with the end of a line."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    return True


def _rates(told: Mapping[str, Any]) -> str:
    from tqdm import tqdm

    eta = "?" if told["eta_s"] is None else tqdm.format_interval(told["eta_s"])
    return f"{told['images_per_s']:.3g} images/s, {told['steps_per_s']:.3g} steps/s, ETA {eta}"


def _board(group: Ranks) -> dist.Store:
    """Where each process can read what the others have posted."""
    if group.size == 1:
        return dist.HashStore()
    host = os.environ.get("MASTER_ADDR", socket.gethostname())
    how: dict[str, Any] = {"wait_for_workers": False, "timeout": timedelta(seconds=ANSWER)}
    own = dist.TCPStore(host, 0, is_master=True, **how) if group.rank == 0 else None
    host, port = group.gather((host, own and own.port))[0]
    return own or dist.TCPStore(host, port, **how)
