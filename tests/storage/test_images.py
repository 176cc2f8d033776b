"""Pictures: diffusers' rounding, grids whose every pixel is accounted for, files that are whole or not there."""

import errno
import io
import os
import resource
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.storage import files, images
from fastddpm.storage.files import TEMPORARY, atomic, check_writable, naming, write_together


def pictures(n, h=4, w=3, c=3):
    return np.random.default_rng(n).integers(0, 256, (n, h, w, c), np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_is_diffusers_rounding(dtype):
    ties = (torch.arange(256, dtype=dtype) + 0.5) / 127.5 - 1
    x = torch.cat([torch.linspace(-1.5, 1.5, 10_000, dtype=dtype), ties, ties.nextafter(ties + 1)])
    x = x[:10_500].reshape(1, 2, 50, 105)
    diffusers = ((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    got = images.to_uint8(x)
    assert np.array_equal(got.numpy(), diffusers)
    assert got.is_contiguous()


def test_to_uint8_equals_the_pipelines_own_conversion():
    from diffusers.image_processor import VaeImageProcessor

    x = torch.randn(3, 3, 8, 5, generator=torch.Generator().manual_seed(0))
    pil = VaeImageProcessor.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    assert np.array_equal(images.to_uint8(x).numpy(), np.stack([np.asarray(image) for image in pil]))


def test_to_uint8_undoes_dequantisation():
    u = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    x = (u.float() - 127.5) * (2 / 255)
    assert torch.equal(images.to_uint8(x.movedim(-1, 1)), u)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_uint8_widens_half_precision_first(dtype):
    x = torch.linspace(-1, 1, 1000).reshape(1, 1, 10, 100).to(dtype)
    assert torch.equal(images.to_uint8(x), images.to_uint8(x.float()))


def test_to_uint8_clamps_infinities_and_names_samples_with_nan():
    x = torch.zeros(4, 1, 2, 2)
    x[1, 0, 0, 0], x[2, 0, 1, 1] = float("inf"), float("-inf")
    got = images.to_uint8(x)
    assert got[1, 0, 0, 0] == 255
    assert got[2, 1, 1, 0] == 0
    x[3, 0, 0, 1] = x[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN in samples \[1, 3\]"):
        images.to_uint8(x)


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(1, 1, 2, 2, dtype=torch.uint8)])
def test_to_uint8_wants_float_images(x):
    with pytest.raises(ValueError, match="want floats"):
        images.to_uint8(x)


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (16, 4, 4), (17, 4, 5)])
@pytest.mark.parametrize("c", [1, 3])
def test_grid_shows_every_image_enlarged_on_white(n, rows, columns, c):
    batch, scale = pictures(n, h=5, w=4, c=c), 2
    picture = images.grid(batch, margin=2, width=columns * 5 * scale + 4)
    want = np.full((rows * 12 + 2, columns * 10 + 2, c), 255, np.uint8)
    for i, image in enumerate(batch):
        top, left = 2 + i // columns * 12, 2 + i % columns * 10
        want[top : top + 10, left : left + 8] = np.kron(image, np.ones((scale, scale, 1), np.uint8))
    assert np.array_equal(picture, want)


def test_grid_of_so_many_columns():
    assert images.grid(pictures(7, h=5, w=4), columns=3, margin=1, width=12).shape == (3 * 6 + 1, 3 * 5 + 1, 3)
    assert images.grid(pictures(1, h=5, w=4), columns=3, margin=1, width=12).shape == (1 * 6 + 1, 3 * 5 + 1, 3)


@pytest.mark.parametrize("columns", [0, -1, 1.5, True])
def test_grid_wants_whole_columns(columns):
    with pytest.raises(ValueError, match=rf"columns is {columns}; want a whole number, at least 1"):
        images.grid(pictures(2), columns=columns)


def test_a_grid_of_so_many_columns_is_saved(tmp_path):
    images.save_grid(pictures(7), tmp_path / "grid.png", columns=2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), images.grid(pictures(7), columns=2))


def test_grid_never_shrinks_large_images():
    assert images.grid(pictures(4, h=50, w=60), width=64).shape == (2 * 52 + 2, 2 * 62 + 2, 3)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), "no images"),
        (np.zeros((2, 4, 4, 3), np.float32), "want uint8"),
        (np.zeros((4, 4, 3), np.uint8), "want uint8"),
        (np.zeros((2, 4, 4, 2), np.uint8), "2 channels"),
    ],
)
def test_grid_wants_8_bit_images(bad, match):
    with pytest.raises(ValueError, match=match):
        images.grid(bad)


@pytest.mark.parametrize("c", [1, 3, 4])
def test_files_read_back(tmp_path, c):
    batch = pictures(3, c=c)
    images.save_grid(batch, tmp_path / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), images.grid(batch).squeeze())
    images.save_pngs(torch.from_numpy(batch), tmp_path / "new" / "folder", indices=[0, 7, 123456])
    names = ["00000.png", "00007.png", "123456.png"]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == names
    read = [np.asarray(Image.open(tmp_path / "new" / "folder" / name)) for name in names]
    assert np.array_equal(np.stack(read), batch.squeeze(-1) if c == 1 else batch)
    images.save_npz(torch.from_numpy(batch), tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"]
        assert np.array_equal(arrays["arr_0"], batch)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3), (2, 3, 4, 4)])
def test_floats_of_any_rank_go_to_npz(tmp_path, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    images.save_npz(x, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], x.numpy())
        assert arrays["arr_0"].dtype == np.float32
    with pytest.raises(ValueError, match="or write"):
        images.save_pngs(x, tmp_path / "pngs")
    assert os.listdir(tmp_path) == ["x.npz"]


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


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        images.save_grid(pictures(2), tmp_path / "grid.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link(tmp_path, there):
    (tmp_path / "elsewhere").mkdir()
    if there:
        (tmp_path / "elsewhere" / "grid.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("elsewhere/grid.png")
    check_writable(tmp_path / "link.png")
    images.save_grid(pictures(1), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "elsewhere" / "grid.png").read_bytes()[:4] == b"\x89PNG"
    assert os.listdir(tmp_path / "elsewhere") == ["grid.png"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
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


def test_check_writable_makes_folders_and_leaves_no_file(tmp_path):
    assert check_writable(tmp_path / "a" / "b" / "x.png") == tmp_path / "a" / "b" / "x.png"
    assert os.listdir(tmp_path / "a" / "b") == []
    check_writable(tmp_path / "c", folder=True)
    assert os.listdir(tmp_path / "c") == []


def test_check_writable_can_leave_folders_to_be_made(tmp_path):
    assert check_writable(tmp_path / "a" / "b", folder=True, make=False) == tmp_path / "a" / "b"
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*/file/b: Not a directory; name another place"):
        check_writable(tmp_path / "file" / "b", folder=True, make=False)


@pytest.mark.parametrize("device", [True, False])
def test_what_could_not_be_written_is_named(tmp_path, device):
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
def test_an_error_that_says_enough_is_left_as_it_is(error):
    told = str(error)
    with pytest.raises(OSError, match=r"encoder|gone") as failed, naming("file"):
        raise error
    assert str(failed.value) == told


def test_check_writable_says_why_not(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path, folder, why in [
        (tmp_path / "file" / "x.png", False, "File exists|Not a directory"),
        (tmp_path / "file", True, "File exists"),
        (tmp_path / "folder.png", False, "it is a folder"),
        (tmp_path / ("n" * 300) / "x.png", False, "name too long"),
        (tmp_path / ("n" * 250), False, "name too long"),  # for the temporary name
    ]:
        with pytest.raises(ValueError, match=f"cannot write .*({why})"):
            check_writable(path, folder=folder)


def test_check_writable_asks_of_a_pipe_too(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_heeds_permissions(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable(tmp_path / "x.png")


def test_png_is_written_whatever_the_name(tmp_path):
    images.save_grid(pictures(1), tmp_path / "no-suffix")
    assert Image.open(io.BytesIO((tmp_path / "no-suffix").read_bytes())).format == "PNG"


@pytest.mark.parametrize("c", [1, 3, 4])
def test_a_png_is_the_picture(c):
    """And has the same bytes each time."""
    picture = pictures(1, h=5, w=4, c=c)[0]
    content = images.png(picture)
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode) == ("PNG", {1: "L", 3: "RGB", 4: "RGBA"}[c])
    assert np.array_equal(np.asarray(image).reshape(picture.shape), picture)
    assert images.png(picture.copy()) == content


def test_what_pictures_are():
    assert all(images.are_pictures(pictures(2, c=c)) for c in (1, 3, 4))
    assert not any(images.are_pictures(pictures(2, c=c)) for c in (2, 5))
    for other in (pictures(2).astype(np.float32), pictures(2).view(np.int8), pictures(2)[0], pictures(2)[None]):
        assert not images.are_pictures(other)


def noted(monkeypatch):
    """In which order files are flushed and named; they are."""
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: order.append((name, *args)) or real(*args))
    return order


def test_files_written_together_are_safe_before_one_appears(tmp_path, monkeypatch):
    """More than are flushed at once; then their names are made safe."""
    contents = {tmp_path / f"{i}": bytes([i]) * i for i in range(3 * files.FLUSHING)}
    (tmp_path / "3").write_bytes(b"old")
    order = noted(monkeypatch)
    write_together(contents.items())
    assert [name for name, *_ in order] == ["fsync"] * len(contents) + ["replace"] * len(contents) + ["fsync"]
    assert [call[2] for call in order if call[0] == "replace"] == list(contents)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_files_written_together_are_flushed_at_once(tmp_path, monkeypatch):
    """Each waits until all of a handful have come that far."""
    all_there = threading.Barrier(files.FLUSHING, timeout=30)
    monkeypatch.setattr(
        os, "fsync", lambda file: all_there.wait() if threading.current_thread().name != "MainThread" else 0
    )
    write_together((tmp_path / f"{i}", b"x") for i in range(files.FLUSHING))
    assert len(os.listdir(tmp_path)) == files.FLUSHING


@pytest.mark.parametrize("failing", [0, 5, 19])
def test_of_files_written_together_none_appears_if_one_fails(tmp_path, monkeypatch, failing):
    """And nothing else stays."""
    contents = [(tmp_path / f"{i}", b"new" * i) for i in range(20)]
    (tmp_path / "7").write_bytes(b"old")
    calls, flush = iter(range(20)), os.fsync

    def full(file):
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as failed:
        write_together(contents)
    assert failed.value.filename in [os.fspath(path) for path, _ in contents]
    assert os.listdir(tmp_path) == ["7"]
    assert (tmp_path / "7").read_bytes() == b"old"


def test_files_written_together_follow_links(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "to" / "file")
    write_together([(tmp_path / "link", b"new"), (tmp_path / "plain", b"x")])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "to" / "file").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["link", "plain", "to"]
    assert os.listdir(tmp_path / "to") == ["file"]


def test_no_files_written_together(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_together([(tmp_path / "no" / "folder", b"")])
    assert os.listdir(tmp_path) == []


def test_temporary_names_are_known_as_such(tmp_path):
    """To who removes what a kill has left; and are of this process alone."""
    seen = []
    with atomic(tmp_path / "x.png"):
        seen += os.listdir(tmp_path)
        assert [path.name for path in tmp_path.glob(TEMPORARY)] == seen
    assert len(seen) == 1
    assert f".{os.getpid()}-" in seen[0]
    for other in ("x.png", ".x.png", "x.7.tmp", ".x.tmp", ".x.png.tmp", ".tmp"):
        (tmp_path / other).touch()
    assert list(tmp_path.glob(TEMPORARY)) == []


def test_a_name_is_made_safe_too(tmp_path, monkeypatch):
    """After it has appeared; where a folder cannot be flushed, or not be read, what can be done is done."""
    order = noted(monkeypatch)
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


def test_no_path_is_not_the_folder_one_is_in():
    for folder in (True, False):
        with pytest.raises(ValueError, match="cannot write '', which is no path; name a place"):
            check_writable("", folder=folder)
