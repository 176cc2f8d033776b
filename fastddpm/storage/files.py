"""Files that appear complete or not at all, and checks that a path can be written before the work begins."""

import errno
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastddpm.core.checks import shown

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".fastddpm-tmp"  # how the name of a file ends while it is being written
SLOTS = 4  # temporary files of one target with known names: as many processes may write it at a time
LONG = 100  # bytes of a name; a temporary file of a longer one is named by its hash, because names end at 255
FLUSHING = 8  # files flushed at a time: a thousand small ones take a tenth of the time of one by one

_SPACE = "free some space, then give the same command again"
_WAYS_OUT = {errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.ENOENT: "its folder is missing"}


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open path for writing; it appears, or changes, only when the block ends without an exception.

    The bytes go to a temporary file in the same folder, which is flushed to disk and then renamed in one step: a reader
    sees the old content or the new, also after a crash. The temporary file is locked while it is written, and it is
    named after path; so the next writer of path deletes what a killed one has left, and nothing else. A symbolic link
    stays, and the file it points to is replaced. A pipe or a device is written to directly.
    """
    if _is_special(path):
        with naming(path), open(path, "wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    with _replacing(target) as file:
        yield file
    _flush_folder(target.parent)


def write_together(contents: Iterable[tuple[Path, bytes]]) -> None:
    """Write files, several at a time; each appears complete or not at all, and all are on disk when this returns.

    After an error or a crash some may have appeared and others not; the caller must check.
    """

    def write(path: Path, content: bytes) -> Path:
        check_regular(path)  # a pipe would wait for a reader
        target = Path(os.path.realpath(path))
        with _replacing(target) as file:
            file.write(content)
        return target.parent

    with ThreadPoolExecutor(FLUSHING) as pool:
        for folder in set(pool.map(write, *zip(*contents, strict=True))):
            _flush_folder(folder)


def delete_leftovers(folder: Path, name: str) -> None:
    """Delete the temporary files of killed processes that were to become the files in a folder that match `name`."""
    for path in folder.glob(f".{name}.*{TEMPORARY}"):
        _delete_if_dead(path)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """In this block, system errors that name no file or a temporary one name path, and say how to go on if possible."""
    try:
        yield
    except OSError as error:
        named = error.filename is not None and not str(error.filename).endswith(TEMPORARY)
        if error.errno is None or named:  # without an errno the message is complete
            raise
        way_out = f"; {_WAYS_OUT[error.errno]}" if error.errno in _WAYS_OUT else ""
        raise OSError(error.errno, f"{error.strerror}{way_out}", os.fspath(path)) from error


def as_path(name: str, value: Any) -> Path:
    """Return value as a Path. Raises: ValueError: it is not a path, or no file can have this name."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise ValueError(f"{name} is {shown(value)}; want a path")
    try:
        unusable = b"\0" in os.fsencode(value)
    except ValueError:  # a lone surrogate
        unusable = True
    if unusable:
        raise ValueError(f"{name} is {shown(os.fspath(value))}, which cannot be the name of a file; name another")
    return Path(value)


def check_writable(path: str | os.PathLike[str], *, folder: bool = False, make: bool = True) -> Path:
    """Check that a file, or with folder=True files inside path, can be written.

    Args:
        path: the file, or the folder.
        folder: path is a folder.
        make: create missing folders; False (with folder=True): only check that they can be created.
    Returns: path.
    Raises: ValueError: it cannot be written; the message says why.
    """
    if isinstance(path, str) and not path:
        raise ValueError("cannot write '': the path is empty; name another place")
    path = as_path("the path to write", path)
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
            target = Path(os.path.realpath(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                target.stat()  # whether its name is too long
            with _temporary(target) as file:
                _delete(file)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; name another place") from error
    return path


def check_regular(path: str | os.PathLike[str]) -> Path:
    """Return path, the file to read from; one that does not exist is left to `open`.

    Raises: ValueError: it is a pipe or a device, from which reading may wait or never end, or its name cannot be one.
    """
    path = as_path("the path to read", path)
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return path
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ValueError(f"{path} is {kind}; want a file")
    return path


def check_not_input(option: str, out: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Raises: ValueError: the file that an option names is one that the command reads, by whatever link."""
    for source in inputs:
        if source is not None and os.path.exists(out) and os.path.exists(source) and os.path.samefile(out, source):
            raise ValueError(f"{option} is {out}, which the command reads from ({source}); name another file")


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder for this process until the block or the process ends; does nothing where there are no locks.

    Raises: ValueError: another process has locked it.
    """
    if fcntl is None:
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


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces target when the block ends; after an exception it is deleted."""
    with naming(target), _temporary(target) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames only closed files
            os.replace(file.name, target)
        except BaseException:
            _delete(file)
            raise


def _temporary(target: Path) -> BinaryIO:
    """Create and lock a temporary file for target, and delete those that killed processes have left for it."""
    name = target.name
    if len(os.fsencode(name)) > LONG:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    paths = [target.with_name(f".{name}.{slot}{TEMPORARY}") for slot in (*range(SLOTS), secrets.token_hex(8))]
    for path in filter(os.path.lexists, paths):
        _delete_if_dead(path)
    for path in paths:  # the last one is free in any case
        with suppress(FileExistsError):
            file = open(path, "xb")  # noqa: SIM115 - the caller closes it
            if _lock(file):
                break
            file.close()
    return file


def _lock(file: BinaryIO) -> bool:
    """Lock a new temporary file. Returns: False if another process has deleted it before."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return _is_at(file.fileno(), file.name)


def _delete_if_dead(path: Path) -> None:
    """Delete a temporary file if nobody writes it any more: its writer would hold the lock."""
    if fcntl is None:
        return
    with suppress(OSError):  # there is none, it is locked or another user's, or the file system has no locks
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                os.unlink(path)
        finally:
            os.close(handle)


def _delete(file: BinaryIO) -> None:
    """Delete a temporary file of this process, unless it has been renamed."""
    with suppress(OSError):
        if file.closed or _is_at(file.fileno(), file.name):
            os.unlink(file.name)


def _is_at(handle: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _flush_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, where the system supports it."""
    if os.name == "posix":
        with suppress(OSError):  # some file systems cannot, and some folders cannot be opened for reading
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
