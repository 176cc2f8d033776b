"""Files that appear whole or not at all, and paths that are known to be writable before the work begins."""

import errno
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".*.[0-9]*.tmp"  # what a kill may leave of `atomic`
_ELSEWHERE = secrets.token_hex(4)  # another machine that writes to the same disk may have this process's number
FLUSHING = 8  # files at once: a thousand small ones take a tenth of the time, as the disk is waited for together


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open path for writing; it appears, or changes, only when the block ends without an exception.

    The bytes go to a temporary name in the same folder, are flushed to the disk, and take the name in one step: whoever
    reads path sees the old content or the new, also after a crash. A link stays, and the file it names is written; a
    pipe or a device is written to as it is.
    """
    if _special(path):
        with naming(path), open(path, "wb") as file:
            yield file
        return
    path, temporary = _resolved(path)
    try:
        with _flushed(path, temporary) as file:
            yield file
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_together(contents: Iterable[tuple[Path, bytes]]) -> None:
    """Write files, of one folder, so that all are safe on the disk when the first of them appears.

    What has appeared and what not after an error or a crash, the caller must find out.
    """

    def written(path: Path, content: bytes) -> Path:
        path, temporary = _resolved(path)
        temporaries.append(temporary)
        with _flushed(path, temporary) as file:
            file.write(content)
        return path

    temporaries: list[Path] = []
    try:
        with ThreadPoolExecutor(FLUSHING) as pool:
            targets = list(pool.map(written, *zip(*contents, strict=True)))
        for target in targets:
            os.replace(_resolved(target)[1], target)
        for folder in {target.parent for target in targets}:
            _flush_folder(folder)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system in this block that name no file, as that of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # without a number it is a sentence
            error.filename = os.fspath(path)
        raise


def check_writable(path: str | os.PathLike[str], *, folder: bool = False, make: bool = True) -> Path:
    """Make sure that a file (or, with folder=True, files inside path) can be written.

    Args:
        make: make missing folders; False: leave those of `path`, a folder, to be made, where that can be done.
    Raises: ValueError: it cannot; says why.
    """
    if not os.fspath(path):
        raise ValueError("cannot write '', which is no path; name a place")
    path = Path(path)
    try:
        if folder:
            if make:
                path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=next(place for place in (path, *path.parents) if place.exists())):
                pass
        elif path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        elif _special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            target, temporary = _resolved(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            temporary.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; name another place") from error
    return path


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep a folder to this process until the block ends, or the process does, where the system has locks.

    Raises: ValueError: it is another's.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            os.close(handle)  # NFS locks what is open for writing alone, which no folder can be
            handle = os.open(Path(folder) / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        way_out = "wait until it has ended, or name another folder"
        raise ValueError(f"{folder} is being written by another process; {way_out}") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def _special(path: str | os.PathLike[str]) -> bool:
    """Whether path is something that cannot be replaced by a file."""
    return os.path.exists(path) and not os.path.isfile(path)


def _resolved(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file that path leads to, and the temporary name beside it."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f".{target.name}.{os.getpid()}-{_ELSEWHERE}.tmp")


@contextmanager
def _flushed(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """Open the temporary file for writing; what is written is safe on the disk when the block ends."""
    with naming(path), open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder safe on the disk, where the system can."""
    if os.name == "posix":
        with suppress(OSError):  # some file systems cannot, some folders can be written and not read
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
