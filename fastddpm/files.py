"""Files that appear whole or not at all, and paths that are known to be writable before the work begins."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open path for writing; it appears, or changes, only when the block ends without an exception.

    The bytes go to a temporary name in the same folder, are flushed to the disk, and take the name in one step: whoever
    reads path sees the old content or the new, also after a crash.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: str | os.PathLike[str], *, folder: bool = False) -> Path:
    """Make sure that a file (or, with folder=True, files inside path) can be written, making missing folders.

    Raises: ValueError: it cannot; says why.
    """
    path = Path(path)
    inside = path if folder else path.parent
    try:
        if not folder and path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        inside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=inside):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; name another place") from error
    return path
