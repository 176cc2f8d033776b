"""Files that appear complete or not at all, and checks that a path can be written before the work begins."""

import errno
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".*.[0-9]*.tmp"  # names of the files that an interrupted `atomic` may leave
_HOST = secrets.token_hex(4)  # a process on another machine that shares the disk may have the same id
FLUSHING = 8  # files flushed at a time: a thousand small ones take a tenth of the time of one by one


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open path for writing; it appears, or changes, only when the block ends without an exception.

    The bytes go to a temporary file in the same folder, which is flushed to disk and then renamed in one step: a reader
    sees the old content or the new, also after a crash. A symbolic link stays, and the file it points to is replaced.
    A pipe or a device is written to directly.
    """
    if _is_special(path):
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
    """Write files of one folder so that all are on disk before the first of them appears.

    After an error or a crash some may have appeared and others not; the caller must check.
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
    """In this block, system errors that name no file, such as that of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # without an errno the message is complete
            error.filename = os.fspath(path)
        raise


def check_writable(path: str | os.PathLike[str], *, folder: bool = False, make: bool = True) -> Path:
    """Check that a file, or with folder=True files inside path, can be written.

    Args:
        path: the file, or the folder.
        folder: path is a folder.
        make: create missing folders; False (with folder=True): only check that they can be created.
    Returns: path.
    Raises: ValueError: it cannot be written; the message says why.
    """
    if not os.fspath(path):
        raise ValueError("cannot write '': the path is empty; name another place")
    path = Path(path)
    try:
        if folder:
            if make:
                path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=next(place for place in (path, *path.parents) if place.exists())):
                pass
        elif path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        elif _is_special(path):
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
    """Lock a folder for this process until the block or the process ends; does nothing where there are no locks.

    Raises: ValueError: another process has locked it.
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
            os.close(handle)  # NFS locks only what is open for writing, which a folder cannot be
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


def _is_special(path: str | os.PathLike[str]) -> bool:
    """Whether path is a pipe, a device or a folder, which a file cannot replace."""
    return os.path.exists(path) and not os.path.isfile(path)


def _resolved(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(the file that path points to, its temporary file in the same folder)."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f".{target.name}.{os.getpid()}-{_HOST}.tmp")


@contextmanager
def _flushed(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing; its content is on disk when the block ends."""
    with naming(path), open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, where the system supports it."""
    if os.name == "posix":
        with suppress(OSError):  # some file systems cannot, and some folders cannot be opened for reading
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
