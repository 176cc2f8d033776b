"""The progress of a job of several processes: each posts its counts, the first shows and logs them all."""

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from types import TracebackType
from typing import Any

import torch.distributed as dist

from fastddpm.processes.displays import Bars, JsonLog, Lines, Stderr
from fastddpm.processes.distributed import AgreedError, Ranks, one_line

BEAT = 0.5  # seconds between two looks at the other processes
SILENT = 600  # a process is lost after this many looks without a sign of life
ANSWER = 60  # seconds that the first process may take to answer another
_FAILED = "failed"


class LostError(AgreedError):
    """The first process does not answer any more. It may have exited because the job is finished."""


@dataclass
class Count:
    """What one process has done of its part.

    Attributes:
        rank: of the process.
        of: samples in its part.
        images: samples of its part that are on the disk.
        steps: calls of the network.
        image_steps: the same calls, each counted once per sample in its batch.
        seconds: from the start to the latest call.
        state: "running", "done", or why the process ended.
        beat: signs of life so far.
    """

    rank: int
    of: int
    images: int = 0
    steps: int = 0
    image_steps: int = 0
    seconds: float = 0.0
    state: str = "running"
    beat: int = 0


class JobProgress:
    """Gathers the counts of all processes; the first process shows and logs them. An error in one ends all.

    Args:
        group: the processes. All of them create a JobProgress at the same time.
        part: samples that this process will draw.
        total: samples of the finished job.
        before: how many of them existed before.
        steps: per sample.
        show: draw bars on a terminal, or print plain lines elsewhere.
        json_log: a file to append JSON lines to.
        stopped: exceptions raised by signals, which Python may have ignored; see `signals.stoppable`.
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
        self.group = group
        self.stopped = stopped
        self.total = total
        self.before = before
        self.steps = steps
        self.count = Count(group.rank, part)
        self.began = time.monotonic()
        self.failure: Exception | None = None
        self.board = _board(group)
        self.heard = [(0, 0)] * group.size  # of each process: its latest beat, and the looks since that one
        self._post()
        group.gather(None)  # all have posted
        self.display: Bars | Lines | None = None
        self.log = None
        if group.rank == 0:
            if show:
                self.display = Bars(group.size) if Stderr().isatty() else Lines(self.began)
            self.log = None if json_log is None else JsonLog(json_log)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def stepped(self, steps: int, samples: int) -> None:
        """Count further steps of a batch. Raises: see `check`."""
        self.check()
        self.count.steps += steps
        self.count.image_steps += steps * samples
        self.count.seconds = time.monotonic() - self.began

    def stored(self, samples: int) -> None:
        """Count further samples on the disk."""
        self.count.images += samples

    def fail(self, error: Exception) -> None:
        """Make the next `check` raise this error, unless there was an earlier one, which may be its cause."""
        if self.failure is None:
            self.failure = error

    def check(self) -> None:
        """Raise the exception of a signal that Python ignored, or an error of another thread or process."""
        for stopped in self.stopped:
            raise stopped
        if self.failure is not None:
            raise self.failure

    def look(self) -> None:
        """Post the counts and ask for failures. Raises: AgreedError: another process has failed; LostError."""
        try:
            self._post()
            failed = self.board.get(_FAILED).decode() if self.board.check([_FAILED]) else None
        except RuntimeError as error:
            raise LostError("process 0 was lost") from error
        if failed is not None:
            raise AgreedError(failed)

    def done(self) -> None:
        """Post that this process has finished its part."""
        self.count.state = "done"
        self._post()

    def __enter__(self) -> "JobProgress":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(10 * BEAT)
        if self._thread.is_alive():  # it waits for the board of a process that does not answer
            return
        if error is not None and not isinstance(error, AgreedError):
            self.count.state = "stopped" if isinstance(error, KeyboardInterrupt) else one_line(error)
            with suppress(RuntimeError):  # the first process has exited
                self._post()
                self.board.set(_FAILED, f"process {self.group.rank}: {self.count.state}")
        if self.group.rank == 0:
            with (
                suppress(OSError, ValueError) if error is not None else nullcontext()
            ):  # report the first error, not a later one
                self._show(self._counts(), last=True)
            if error is not None and self.group.size > 1:
                time.sleep(2 * BEAT)  # the board ends with this process: let the others read the error first

    def _run(self) -> None:
        while self.failure is None and not self._ended.wait(BEAT):
            try:
                self.look()
                if self.group.rank == 0:
                    counts = self._counts()
                    self._show(counts)
                    self._find_silent(counts)
            except Exception as error:
                self.fail(error)

    def _post(self) -> None:
        """Write this process's counts on the board."""
        self.count.beat += 1
        self.board.set(str(self.group.rank), json.dumps(asdict(self.count)))

    def _counts(self) -> list[Count]:
        """The counts that all processes have posted."""
        return [Count(**json.loads(self.board.get(str(rank)))) for rank in range(self.group.size)]

    def _show(self, counts: Sequence[Count], *, last: bool = False) -> None:
        summary = self.summary(counts)
        if self.display is not None:
            self.display.update(summary, last)
        if self.log is not None:
            self.log.update(summary, last)

    def _find_silent(self, counts: Sequence[Count]) -> None:
        """Make the job fail if a process has given no sign of life for a long time."""
        for count in counts:
            beat, looks = self.heard[count.rank]
            self.heard[count.rank] = (beat, looks + 1) if count.beat == beat else (count.beat, 0)
            if looks > SILENT:
                what = f"process {count.rank} has given no sign of life for {SILENT * BEAT:.0f} seconds"
                self.board.set(_FAILED, what)

    def summary(self, counts: Sequence[Count]) -> dict[str, Any]:
        """The counts, rates and remaining time of the job and of each process, ready for JSON."""
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


def _board(group: Ranks) -> dist.Store:
    """A store that all processes can reach, where each posts its counts."""
    if group.size == 1:
        return dist.HashStore()
    host = os.environ.get("MASTER_ADDR", socket.gethostname())
    timeout = timedelta(seconds=ANSWER)
    own = None
    if group.rank == 0 and group.on_one_machine():
        with socket.create_server(("127.0.0.1", 0)) as listener:  # left to itself, the store listens to every network
            host, port = listener.getsockname()
            own = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
            )
    elif group.rank == 0:
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    host, port = group.gather((host, own and own.port))[0]
    return own or dist.TCPStore(host, port, wait_for_workers=False, timeout=timeout)
