"""Two processes that take turns, one timed round each, so that both see the machine in the same state.

A process runs only while it has the turn: from its start to its first `over`, and from the return of each `over` to the
next one. When a process ends, the other continues. A process is pytest with this module as a plugin, which reports the
order of its cases. A waiting process reads from a socket: a thread that spins would disturb the other.
"""

import json
import math
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROCESSES = 2 if "BENCH_TURNS" in os.environ else 1  # processes of ours that may use the device

# In the measured process


def over(case: str) -> None:
    """Give up the turn before a timed round of a case (a pytest node id), and wait to get it back.

    The GPU must have finished all work. Returns at once if there is no partner.

    Raises: KeyboardInterrupt: the process that gives turns has ended.
    """
    if (link := _link()) is not None:
        _tell(case)
        with suppress(ConnectionError):
            if link.recv(1):
                return
        raise KeyboardInterrupt("the process that gives turns has ended")


def pytest_collection_finish(session: Any) -> None:
    _tell([item.nodeid for item in session.items])


@cache
def _link() -> socket.socket | None:
    if "BENCH_TURNS" not in os.environ:
        return None
    link = socket.socket(fileno=int(os.environ["BENCH_TURNS"]))
    link.set_inheritable(False)
    os.register_at_fork(after_in_child=link.close)  # otherwise a child that outlives this process would keep its turn
    return link


def _tell(message: str | list[str]) -> None:
    if (link := _link()) is not None:
        with suppress(ConnectionError):
            link.sendall(json.dumps(message).encode() + b"\n")


# In the process that gives turns


class Side:
    """One of the two: a command that is started at its first turn. Its output is appended to a file."""

    def __init__(self, command: Sequence[str], *, cwd: Path, env: dict[str, str], log: Path) -> None:
        self.command, self.cwd, self.env, self.log = command, cwd, env, log
        self.process: subprocess.Popen[bytes] | None = None
        self.status: int | None = None  # once it has ended; -N after signal N
        self.cases: list[str] = []  # in the order in which it runs them
        self.case, self.round = "", 0  # that it is waiting to measure

    def turn(self) -> None:
        """Let it run until it gives up the turn or ends."""
        if self.process is None:
            self._start()
        else:
            with suppress(ConnectionError):  # killed while it waited
                self.link.sendall(b"\n")
        while (message := self._hear()) is not None:
            if isinstance(message, str):
                self.case, self.round = message, self.round + 1 if message == self.case else 0
                return
            self.cases = message
        self._end()

    def kill(self) -> None:
        """Kill it and its children, if it is still running."""
        if self.process is not None and self.status is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._end()

    def _start(self) -> None:
        self.link, theirs = socket.socketpair()
        self.lines = self.link.makefile()
        with theirs, self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=self.env | {"BENCH_TURNS": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only this process
            )

    def _end(self) -> None:
        self.status = self.process.wait()
        self.lines.close()
        self.link.close()

    def _hear(self) -> Any:
        """Return a case, the list of all cases, or None at the end."""
        with suppress(ConnectionError):
            if (line := self.lines.readline()).endswith("\n"):
                return json.loads(line)
        return None


def alternate(sides: Sequence[Side], title: str) -> None:
    """Run both to the end. Rounds of the same case alternate, A B B A A B B A, starting with the first of `sides`.

    A side that is behind, in the order of the cases or in the rounds of a case, runs until it has caught up: either
    side may skip cases, fail in them, or take fewer rounds.
    """
    try:
        with tqdm(desc=title, unit=" cases") as bar:
            for side in sides:
                side.turn()
            places = {case: place for place, case in enumerate(merged(*(side.cases for side in sides)))}
            order, bar.total = list(sides), len(places)
            while any(side.status is None for side in sides):
                positions = [_position(side, places) for side in order]
                behind = order[positions.index(min(positions))]
                if positions[0] == positions[1]:
                    order.reverse()
                if (done := min(positions)[0]) != bar.n:
                    bar.set_postfix_str(behind.case, refresh=False)
                    bar.update(done - bar.n)
                behind.turn()
            bar.update(len(places) - bar.n)
    finally:
        for side in sides:
            side.kill()


def merged(cases: Sequence[str], others: Sequence[str]) -> list[str]:
    """Merge two lists of cases in the order of the first; a case that only the other has keeps its place there."""
    order, place = list(cases), 0
    for case in others:
        if case not in order:
            order.insert(place, case)
        place = order.index(case) + 1
    return order


def _position(side: Side, places: dict[str, int]) -> tuple[float, int]:
    if side.status is not None:
        return math.inf, 0
    return places.setdefault(side.case, len(places)), side.round
