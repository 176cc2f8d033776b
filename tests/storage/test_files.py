"""Files that are complete or missing, also after errors and through links and pipes; paths that cannot be written."""

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from fastddpm.storage import files, images
from fastddpm.storage.files import (
    TEMPORARY,
    as_path,
    atomic,
    check_not_input,
    check_regular,
    check_writable,
    naming,
    write_together,
)
from tests.support.check import error_line


def pictures(n, h=4, w=3, c=3):
    return np.random.default_rng(n).integers(0, 256, (n, h, w, c), np.uint8)


def test_atomic_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as file:  # noqa: PT012 - the block is what fails
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    with atomic(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_flushes_to_disk_before_renaming(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", os.fstat(fd).st_size)))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), rename(*names)))
    with atomic(tmp_path / "file") as file:
        file.write(b"12345")
    assert calls[:2] == [("fsync", 5), "replace"]


def test_failed_save_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        images.save_grid(pictures(2), tmp_path / "grid.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_link_stays_a_link(tmp_path, there):
    (tmp_path / "elsewhere").mkdir()
    if there:
        (tmp_path / "elsewhere" / "grid.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("elsewhere/grid.png")
    check_writable(tmp_path / "link.png")
    images.save_grid(pictures(1), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "elsewhere" / "grid.png").read_bytes()[:4] == b"\x89PNG"
    assert os.listdir(tmp_path / "elsewhere") == ["grid.png"]


def test_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_writable(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    images.save_npz(pictures(2), pipe)
    assert pipe.is_fifo()
    reader.join()
    with np.load(io.BytesIO(read[0])) as arrays:
        assert np.array_equal(arrays["arr_0"], pictures(2))


def test_files_obey_the_umask(tmp_path):
    images.save_npz(pictures(1), tmp_path / "x.npz")
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_check_writable_creates_folders_and_leaves_no_file(tmp_path):
    assert check_writable(tmp_path / "a" / "b" / "x.png") == tmp_path / "a" / "b" / "x.png"
    assert os.listdir(tmp_path / "a" / "b") == []
    check_writable(tmp_path / "c", folder=True)
    assert os.listdir(tmp_path / "c") == []


def test_check_writable_without_creating_folders(tmp_path):
    assert check_writable(tmp_path / "a" / "b", folder=True, make=False) == tmp_path / "a" / "b"
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*/file/b: Not a directory; name another place"):
        check_writable(tmp_path / "file" / "b", folder=True, make=False)


@pytest.mark.parametrize("device", [True, False])
def test_system_errors_name_the_file(tmp_path, device):
    path = "/dev/full" if device else str(tmp_path / "file")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"No space left|File too large") as failed, atomic(path) as file:
            file.write(bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.value.filename == path
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("encoder error -2"), FileNotFoundError(errno.ENOENT, "gone", "other")])
def test_errors_with_a_file_or_without_errno_stay_unchanged(error):
    text = str(error)
    with pytest.raises(OSError, match=r"encoder|gone") as failed, naming("file"):
        raise error
    assert str(failed.value) == text


def test_check_writable_gives_the_reason(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path, folder, why in [
        (tmp_path / "file" / "x.png", False, "File exists|Not a directory"),
        (tmp_path / "file", True, "File exists"),
        (tmp_path / "folder.png", False, "it is a folder"),
        (tmp_path / ("n" * 300) / "x.png", False, "name too long"),
        (tmp_path / ("n" * 256), False, "name too long"),
    ]:
        with pytest.raises(ValueError, match=f"cannot write .*({why})"):
            check_writable(path, folder=folder)


def test_check_writable_of_a_pipe(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_checks_permissions(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable(tmp_path / "x.png")


def recorded(monkeypatch):
    """The calls of fsync and replace in order; they are carried out."""
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: order.append((name, *args)) or real(*args))
    return order


def test_write_together_flushes_each_file_before_it_appears(tmp_path, monkeypatch):
    """With more files than are flushed at a time; then the names are flushed, once."""
    contents = {tmp_path / f"{i}": bytes([i]) * i for i in range(3 * files.FLUSHING)}
    (tmp_path / "3").write_bytes(b"old")
    order = recorded(monkeypatch)
    write_together(contents.items())
    assert sorted(name for name, *_ in order) == ["fsync"] * (len(contents) + 1) + ["replace"] * len(contents)
    assert order[-1][0] == "fsync"
    assert {call[2] for call in order if call[0] == "replace"} == set(contents)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_write_together_flushes_files_in_parallel(tmp_path, monkeypatch):
    """Each flush waits until all threads have come to theirs."""
    all_there = threading.Barrier(files.FLUSHING, timeout=30)
    monkeypatch.setattr(
        os, "fsync", lambda file: all_there.wait() if threading.current_thread().name != "MainThread" else 0
    )
    write_together((tmp_path / f"{i}", b"x") for i in range(files.FLUSHING))
    assert len(os.listdir(tmp_path)) == files.FLUSHING


@pytest.mark.parametrize("failing", [0, 5, 19])
def test_write_together_leaves_whole_files_if_one_fails(tmp_path, monkeypatch, failing):
    contents = {tmp_path / f"{i}": b"new" * i for i in range(20)}
    (tmp_path / "7").write_bytes(b"old")
    calls, flush = iter(range(20)), os.fsync

    def full(file):
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as failed:
        write_together(contents.items())
    assert failed.value.filename in map(os.fspath, contents)
    held = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert all(content in (contents[path], b"old" if path.name == "7" else None) for path, content in held.items())
    assert failed.value.filename not in map(os.fspath, held) or failed.value.filename.endswith("/7")


def test_write_together_follows_links(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "to" / "file")
    write_together([(tmp_path / "link", b"new"), (tmp_path / "plain", b"x")])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "to" / "file").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["link", "plain", "to"]
    assert os.listdir(tmp_path / "to") == ["file"]


def test_write_together_into_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_together([(tmp_path / "no" / "folder", b"")])
    assert os.listdir(tmp_path) == []


DYING = """
import os, signal, sys
from fastddpm.storage.files import atomic
with atomic(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    input()
"""


def writer(path, then):
    """A process that has written half of a file and then is killed, or waits for a line."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", DYING, path, then], **pipes)
    assert process.stdout.readline() == b"ready\n"
    if then == "die":
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    return process


NAMES = ["x.npz", "n" * 255, "\N{SNOWMAN}" * 85, "with space", "-", "\udcff.png"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:10]))
@pytest.mark.parametrize("write", [atomic, check_writable, write_together])
def test_leftovers_of_killed_writers_are_deleted(tmp_path, name, write):
    """By the next writer of the same file, or the next check of whether it can be written."""
    for _ in range(2):
        writer(tmp_path / name, "die")
    (left,) = os.listdir(tmp_path)
    assert left.endswith(TEMPORARY)
    writer(tmp_path / "other", "die")
    if write is atomic:
        with atomic(tmp_path / name) as file:
            file.write(b"new")
    elif write is write_together:
        write_together([(tmp_path / name, b"new")])
    else:
        write(tmp_path / name)
    done = [] if write is check_writable else [name]
    assert sorted(os.listdir(tmp_path)) == sorted([*done, f".other.0{TEMPORARY}"])
    assert all((tmp_path / path).read_bytes() == b"new" for path in done)


def test_files_of_others_are_not_deleted(tmp_path):
    """Hidden files of the user, however they are named, and those that other processes or threads are writing."""
    path, mine = tmp_path / "x.npz", [".x.npz.123.tmp", ".x.npz.1-00ff.tmp", f".y.npz.0{TEMPORARY}", "x.npz.tmp"]
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / f".x.npz.2{TEMPORARY}").symlink_to("folder")
    (tmp_path / f".x.npz.3{TEMPORARY}").mkdir()
    before = sorted(os.listdir(tmp_path))
    other = writer(path, "wait")
    with atomic(path) as first, atomic(path) as second:
        first.write(b"first")
        second.write(b"second")
        with atomic(path) as third:
            third.write(b"third")
        assert len({first.name, second.name, third.name}) == 3
    assert path.read_bytes() == b"first"
    other.communicate(b"\n")
    assert other.returncode == 0
    assert path.read_bytes() == b"half"
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "x.npz"])
    assert all((tmp_path / name).read_bytes() == b"mine" for name in mine)


def test_leftovers_stay_where_there_are_no_locks(tmp_path, monkeypatch):
    """There nobody can tell whether their writers live."""
    path = tmp_path / "x"

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    for slot in range(files.SLOTS):
        (tmp_path / f".x.{slot}{TEMPORARY}").write_bytes(b"other")
    before = os.listdir(tmp_path)
    with atomic(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "x"])
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    with atomic(path) as file:
        file.write(b"newer")
    assert path.read_bytes() == b"newer"
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "x"])


def test_file_taken_for_a_leftover_is_created_again(tmp_path, monkeypatch):
    """Another process may delete it in the moment before it is locked."""
    lock, taken = files.fcntl.flock, []

    def late(file, operation):
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)
        lock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with atomic(tmp_path / "x") as file:
        file.write(b"new")
    assert taken == [str(tmp_path / f".x.0{TEMPORARY}")]
    assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_full_disks_and_vanished_folders_name_the_file_and_the_way_out(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "x"
    path.parent.mkdir()
    with pytest.raises(FileNotFoundError, match="its folder is missing") as gone, atomic(path) as file:  # noqa: PT012
        os.unlink(file.name)
        path.parent.rmdir()
    assert (gone.value.filename, gone.value.filename2) == (str(path), None)
    assert TEMPORARY not in str(gone.value)
    for number in (errno.ENOSPC, errno.EDQUOT):
        with (
            pytest.raises(OSError, match="; free some space, then give the same command again: ") as full,
            naming(path),
        ):
            raise OSError(number, os.strerror(number))
        assert (full.value.errno, full.value.filename) == (number, str(path))


@pytest.mark.parametrize("path", [0, None, b"x", ["x"], 1.5, True])
def test_other_types_are_not_paths(path):
    for call in (lambda: as_path("out", path), lambda: check_writable(path), lambda: check_regular(path)):
        assert error_line(call).endswith(f"is {path!r}; want a path")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x\ud83d.npz"], ids=ascii)
def test_names_that_no_file_can_have_are_refused(name):
    for call in (as_path, lambda _, path: check_writable(path), lambda _, path: check_regular(path)):
        assert error_line(call, "out", name).endswith(f"is {name!r}, which cannot be the name of a file; name another")


def test_only_files_are_read_from(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("pipe")
    for name in ("file", "missing"):
        assert check_regular(tmp_path / name) == tmp_path / name
    for name, kind in (("pipe", "a pipe or a device"), ("link", "a pipe or a device"), (".", "a folder")):
        assert error_line(check_regular, tmp_path / name) == f"{tmp_path / name} is {kind}; want a file"
    assert "pipe or a device" in error_line(check_regular, "/dev/zero")
    assert "pipe or a device" in error_line(write_together, [(tmp_path / "pipe", b"x")])


def test_outputs_that_are_inputs_are_refused(tmp_path):
    """By whatever name; a missing or another file is fine."""
    data = tmp_path / "data"
    data.touch()
    os.link(data, tmp_path / "hard")
    (tmp_path / "soft").symlink_to("data")
    (tmp_path / "other").touch()
    for name in ("data", "hard", "soft", "./data"):
        out = f"{tmp_path}/{name}"
        want = f"--out is {out}, which the command reads from ({data}); name another file"
        assert error_line(check_not_input, "--out", out, None, tmp_path / "missing", data) == want
    for name in ("other", "new"):
        check_not_input("--out", tmp_path / name, None, tmp_path / "missing", data)


def test_atomic_flushes_the_folder(tmp_path, monkeypatch):
    """After the file has appeared; a folder that cannot be flushed or read is no error."""
    order = recorded(monkeypatch)
    with atomic(tmp_path / "file") as file:
        file.write(b"x")
    assert [name for name, *_ in order] == ["fsync", "replace", "fsync"]
    opened, flush = os.open, os.fsync

    def refuse(path, flags, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    def cannot(file):
        if not os.path.isfile(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(file)

    for name, function in (("open", refuse), ("fsync", cannot)):
        monkeypatch.setattr(os, name, function)
        with atomic(tmp_path / name) as file:
            file.write(b"x")
        assert (tmp_path / name).read_bytes() == b"x"
        monkeypatch.setattr(os, name, {"open": opened, "fsync": flush}[name])


def test_check_writable_refuses_an_empty_path():
    for folder in (True, False):
        with pytest.raises(ValueError, match="cannot write '': the path is empty; name another place"):
            check_writable("", folder=folder)
