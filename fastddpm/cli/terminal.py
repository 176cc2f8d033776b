"""What the command line writes: streams whose failure does not stop the work, and messages that are safe to print."""

import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

LONGEST_WORD, LONGEST_MESSAGE = 300, 4000  # characters
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Stream:
    """stdout or stderr as a command sees it.

    Control characters are written as escapes. If nobody can read the stream any more, because its pipe is closed or
    its disk is full, the work goes on without it.

    Args:
        stream: what to write to.
        errors: how characters that its encoding lacks are written, as `open` takes it.
        kept: a regular expression for the control characters that are written as they are.
    Attributes:
        failure: the first error of the stream; None while it works.
    """

    def __init__(self, stream: TextIO, *, errors: str, kept: str):
        self.stream = stream
        self.failure: OSError | ValueError | None = None
        self._parts = re.compile(f"({kept})")
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)

    def write(self, text: str) -> int:
        if not text.isprintable():
            parts = self._parts.split(text)  # [other text, kept, other text, ...]
            text = "".join(part if i % 2 else escaped(part) for i, part in enumerate(parts))
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable[..., Any], *arguments: str) -> None:
        try:
            action(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.failure = self.failure or error
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())  # Python flushes it once more when it exits

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def streams() -> Iterator[Stream]:
    """Replace sys.stdout and sys.stderr by `Stream`s, and print warnings as messages. Yields: that of stdout."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    before = sys.stdout, sys.stderr, warnings.formatwarning
    stdout = Stream(sys.stdout, errors="replace", kept=r"[\n\t]")
    stderr = Stream(sys.stderr, errors="backslashreplace", kept=r"[\n\t\r]|\x1b\[A")  # bars return, and move up
    sys.stdout, sys.stderr = stdout, stderr
    warnings.formatwarning = lambda message, *_, **__: f"{one_line(f'fastddpm: warning: {message}')}\n"
    try:
        yield stdout
    finally:
        stdout.flush()
        stderr.flush()
        sys.stdout, sys.stderr, warnings.formatwarning = before


def escaped(text: str) -> str:
    r"""The text with every character that cannot be printed written as an escape, such as \x1b or \udce9."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """A message as one line that is safe to print: without control characters, and without very long words."""
    words = (_shortened(word, LONGEST_WORD) for word in escaped(" ".join(text.split())).split(" "))
    return _shortened(" ".join(words), LONGEST_MESSAGE)


def tell(message: str) -> None:
    """Print a message on stderr, as all errors and warnings of the command line are printed."""
    print(one_line(f"fastddpm: {message}"), file=sys.stderr)


def explained(error: Exception) -> str:
    """What an error says, with its type if it is an unexpected one, and with a way out where that is the machine's."""
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"out of memory; ask for less at a time, such as a smaller --batch-size ({text or 'MemoryError'})"
    if isinstance(error, OSError) and error.errno in _NO_SPACE and "free some space" not in text:
        return f"{text}; free some space there, or write to another place"
    if isinstance(error, ValueError | OSError):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def _shortened(text: str, length: int) -> str:
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"
