"""Ctrl-C and SIGTERM: deferred until work is finished and saved, or raised as an exception that says how to resume."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

REPEAT_SECONDS = 1.0  # a signal that arrives again this soon is the same request
_DEFAULT_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a job.

    Attributes:
        number: of the signal. The message says how to resume the job.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


@contextmanager
def deferred() -> Iterator[list[int]]:
    """Defer Ctrl-C and SIGTERM until the block ends, so that the work inside can finish and be saved.

    A second signal of the same kind takes effect at once. Signals for which the program has its own handler are not
    deferred, and none are outside the main thread.

    Yields: a list that receives the numbers of the deferred signals. The first of them is raised after the block.
    """
    caught: list[int] = []
    handlers: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, handlers[number])

    if _in_main_thread():
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


@contextmanager
def stoppable(message: Callable[[], str]) -> Iterator[list[Stopped]]:
    """Let Ctrl-C and SIGTERM raise `Stopped` in this block, unless the program has its own handlers.

    A second signal kills the process, but not within REPEAT_SECONDS of the first: torchrun forwards to its processes
    the signal that a terminal or a scheduler has already sent to all of them.

    Args:
        message: returns the message of the `Stopped` that leaves the block; called when the block is stopped.
    Yields: a list that receives the exception when it is raised. Python ignores an exception that is raised during a
        finaliser, so long work must check the list.
    """
    stopped: list[Stopped] = []
    first = 0.0

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        if not stopped:
            first = time.monotonic()
            stopped.append(Stopped("", number))
            raise stopped[0]
        if time.monotonic() - first > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    replaced = {
        number: handler
        for number, handler in _DEFAULT_HANDLERS.items()
        if _in_main_thread() and signal.getsignal(number) == handler
    }
    for number in replaced:
        signal.signal(number, stop)
    try:
        yield stopped
    except KeyboardInterrupt as error:
        cause = error.number if isinstance(error, Stopped) else signal.SIGINT
        raise Stopped(message(), cause) from None
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    """Whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()
