"""Arrays in .npz, .npy and idx files: found by name, and read as far as their headers and their bytes agree."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from fastddpm.storage.datasets import array_name, image_files, load_classes, load_images, load_labels, stream_images


def pictures(n=5, h=4, w=6, c=3):
    return np.random.default_rng(7).integers(0, 256, (n, h, w, c), np.uint8)


LABELS = np.array([2, 0, 1, 1, 0])


def streamed(path, **options):
    count, batches = stream_images(path, **options)
    batches = list(batches)
    assert sum(map(len, batches)) == count
    return np.concatenate(batches)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def save_members(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def with_header(text, values=b""):
    """An .npy file with such a header."""
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + values


# Names


@pytest.fixture
def medmnist(tmp_path):
    arrays = {f"{part}_images": pictures(5 + k)[..., 0] for k, part in enumerate(["train", "val", "test"])}
    labels = {f"{part}_labels": np.arange(5 + k)[:, None] for k, part in enumerate(["train", "val", "test"])}
    np.savez(tmp_path / "m.npz", **arrays, **labels)
    return tmp_path / "m.npz"


def test_medmnist(medmnist):
    assert np.array_equal(load_images(medmnist), pictures(5)[..., :1])
    assert np.array_equal(load_images(medmnist, held_out=True), pictures(7)[..., :1])
    assert load_labels(medmnist, count=5).tolist() == [*range(5)]
    assert load_labels(medmnist, count=7, held_out=True).tolist() == [*range(7)]
    assert [array_name(medmnist, held_out=held_out) for held_out in (False, True)] == ["train_images", "test_images"]


@pytest.mark.parametrize(("part", "count"), [("train", 5), ("val", 6), ("test", 7)])
@pytest.mark.parametrize("held_out", [False, True])
def test_an_array_is_named_after_a_colon(medmnist, part, count, held_out):
    path = f"{medmnist}:{part}_images"
    assert np.array_equal(load_images(path, held_out=held_out), pictures(count)[..., :1])
    assert np.array_equal(streamed(path, batch=4), pictures(count)[..., :1])
    assert load_labels(path, count=count, held_out=held_out).tolist() == [*range(count)]
    assert array_name(path, held_out=held_out) == f"{part}_images"
    assert image_files(path) == [medmnist]
    assert load_classes(path) is None


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("x_val", "y_val"),
        ("X_train", "y_train"),
        ("train_data", "train_labels"),
        ("image", "label"),
        ("pics", "labels"),
    ],
)
def test_labels_of_a_named_array(tmp_path, images, labels):
    np.savez(tmp_path / "x.npz", **{images: pictures(), labels: LABELS, "other": pictures()})
    assert np.array_equal(load_labels(f"{tmp_path / 'x.npz'}:{images}", count=5), LABELS)
    if labels != "labels":
        with pytest.raises(ValueError, match=r"it holds .*; want labels of other in an array named labels"):
            load_labels(f"{tmp_path / 'x.npz'}:other", count=5)


@pytest.mark.parametrize("name", ["a:b", "group/x", "with space", "ü", "x.npz"])
def test_names_of_all_kinds(tmp_path, name):
    (tmp_path / "in:x.npz").mkdir()
    path = tmp_path / "in:x.npz" / "data:1.npz"
    np.savez(path, **{name: pictures(), "other": pictures(2)})
    assert np.array_equal(load_images(f"{path}:{name}"), pictures())
    path.rename(tmp_path / "in:x.npz" / "data:1.npz:other")
    assert np.array_equal(load_images(f"{path}:other:{name}"), pictures())


def test_missing_names_and_files(tmp_path, medmnist):
    listed = "it holds train_images, val_images, test_images, train_labels, val_labels, test_labels"
    for wrong, message in [("x", f"{listed}, but no x"), ("", f"{listed}, but none is named after the colon")]:
        for load in (load_images, stream_images):
            with pytest.raises(ValueError, match=f"cannot load {medmnist} as .npz: {message}$"):
                load(f"{medmnist}:{wrong}")
    with pytest.raises(
        ValueError, match=r"cannot read .*absent.npz:x: No such file or directory; want an .npz or .npy"
    ):
        load_images(tmp_path / "absent.npz:x")
    (tmp_path / "x.npy").write_bytes(npy(pictures()))
    with pytest.raises(ValueError, match=r"x.npy is not an .npz; leave out :y"):
        load_images(tmp_path / "x.npy:y")
    np.savez(tmp_path / "two.npz", one=pictures(), two=pictures())
    with pytest.raises(ValueError, match=r"want an array named x_train, .*, or name one, as in .*two.npz:one$"):
        load_images(tmp_path / "two.npz")


# .npy


@pytest.mark.parametrize("array", [pictures(), pictures()[..., 0], np.asfortranarray(pictures()), pictures()[::2]])
def test_npy(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    want = array if array.ndim == 4 else array[..., None]
    assert np.array_equal(load_images(tmp_path / "x.npy"), want)
    assert np.array_equal(streamed(tmp_path / "x.npy", batch=2), want)
    assert array_name(tmp_path / "x.npy") is None


@pytest.mark.parametrize(
    ("images", "labels"),
    [("x_train", "y_train"), ("train_images", "train_labels"), ("v6_data", "v6_labels"), ("pictures", "labels")],
)
def test_npy_labels_are_beside(tmp_path, images, labels):
    np.save(tmp_path / f"{images}.npy", pictures())
    with pytest.raises(ValueError, match=f"{images}.npy has no labels beside it; want {tmp_path / labels}.npy"):
        load_labels(tmp_path / f"{images}.npy", count=5)
    np.save(tmp_path / f"{labels}.npy", LABELS)
    assert np.array_equal(load_labels(tmp_path / f"{images}.npy", count=5), LABELS)


def test_npy_of_other_numbers_suggests_a_conversion(tmp_path):
    np.save(tmp_path / "x.npy", pictures() / np.float32(255))
    for load in (load_images, stream_images):
        with pytest.raises(ValueError, match=r"x.npy is \[5, 4, 6, 3\] float32; .* \(x \* 255\).round\(\)"):
            load(tmp_path / "x.npy")


# Damage

HEADERS = {
    "negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-5, -4, 6, 3)}",
    "huge": f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**23}, 4, 6, 3)}}",
    "larger than there are bytes": "{'descr': '|u1', 'fortran_order': False, 'shape': (5000000000, 64, 64, 3)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (5, 4, 6, 3)}",
    "no bytes": "{'descr': '|V0', 'fortran_order': False, 'shape': (5, 4, 6, 3)}",
    "floats": "{'descr': '|u1', 'fortran_order': False, 'shape': (5.0, 4, 6, 3)}",
    "nested": "(" * 5000,
    "long": "{'descr': '|u1', 'fortran_order': False, 'shape': (5, 4, 6, 3)}" + " " * 20_000,
    "other text": "import os",
    "no shape": "{'descr': '|u1', 'fortran_order': False}",
    "unknown type": "{'descr': 'nothing', 'fortran_order': False, 'shape': (5, 4, 6, 3)}",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("form", ["npz", "npy"])
def test_damaged_headers(tmp_path, header, form):
    """No word of numpy's about pickles, and no memory for what is not there."""
    path = tmp_path / f"x.{form}"
    content = with_header(header, pictures().tobytes())
    if form == "npz":
        save_members(path, x=content)
    else:
        path.write_bytes(content)
    for load in (load_images, lambda path: list(stream_images(path)[1])):
        tracemalloc.start()
        with pytest.raises(ValueError, match=f"cannot load {path} as .{form}: (x|it) (holds|has) ") as caught:
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()
        assert not {"pickle", "max_header_size", "trust"} & set(str(caught.value).split())


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"text", pictures().tobytes(), b"\x93NUMPY", b"\x93NUMPY\x09\x09", b"\x80\x04K\x01."]
)
def test_members_that_are_no_arrays(tmp_path, content):
    path = save_members(tmp_path / "x.npz", x=content)
    with pytest.raises(ValueError, match=r"x has no header of an .npy array, or a damaged one$"):
        load_images(path)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("form", ["npz", "npy"])
def test_values_that_do_not_fit_the_header(tmp_path, change, form):
    content = npy(pictures())[:-1] if change < 0 else npy(pictures()) + b"x"
    path = tmp_path / f"x.{form}"
    if form == "npz":
        save_members(path, x=content)
    else:
        path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"holds {360 + change} bytes of values, but its header says \[5, 4, 6, 3\] uint8"
    ):
        load_images(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_of_every_compression(tmp_path, compression):
    images = pictures(50, 16, 16)
    whole = save_members(tmp_path / "x.npz", compression, x=npy(images)).read_bytes()
    assert np.array_equal(load_images(tmp_path / "x.npz"), images)
    for at in range(60, len(whole) - 200, 2111):
        (tmp_path / "x.npz").write_bytes(whole[:at] + b"\xff" * 40 + whole[at + 40 :])
        for load in (load_images, lambda path: list(stream_images(path)[1])):
            with pytest.raises(ValueError, match=r"^cannot load .*x.npz as .npz: .") as caught:
                load(tmp_path / "x.npz")
            assert "\n" not in str(caught.value)


def test_a_size_that_the_archive_only_claims(tmp_path):
    """The table of contents says 4 GB, and so does the header, but there are some bytes."""
    claimed, header = (1 << 32) - 2, with_header("")
    for _ in range(2):  # the second time with the right length of the header
        shape = (claimed - len(header), 1, 1)
        header = with_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}")
    path = save_members(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, x=header + bytes(1000))
    whole = bytearray(path.read_bytes())
    start = whole.rindex(b"PK\1\2")
    whole[start + 24 : start + 28] = struct.pack("<I", claimed)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"cannot load .*x.npz as .npz: (it ends before|Bad CRC)"):
        load_images(path)


def test_more_memory_than_there_is(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", x=pictures())

    def empty(*args):
        raise MemoryError

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(ValueError, match=r"cannot load .*x.npz as .npz: there is not enough memory for it"):
        load_images(tmp_path / "x.npz")


def test_a_large_array_of_another_type_is_not_read(tmp_path):
    """A sparse file of 16 GB."""
    path = tmp_path / "x.npy"
    header = with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 64, 64, 1)}")
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * 64 * 64 * 1_000_000)
    with pytest.raises(ValueError, match=r"x.npy is \[1000000, 64, 64, 1\] float32; want uint8"):
        load_images(path)


# idx


def idx(*shape, values=b""):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + values


@pytest.mark.parametrize("load", [load_images, lambda path: list(stream_images(path)[1])])
@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"text that is no idx at all", "is of unknown type inside its gzip"),
        (idx(5, 4, 6), "it holds more than the 120 bytes of"),
        (idx(70_000, 1000, 1000), r"it ends before the 70000000000 bytes of"),
        (idx(2**32 - 1, 2**32 - 1, 2**32 - 1), "holds too few bytes of images, but its header says"),
    ],
)
def test_a_bomb_in_gzip_is_not_unpacked(tmp_path, load, header, message):
    """100 MB of zeros in 100 kB: as much is read as the header says."""
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(header + bytes(100_000_000 if "holds more" in message else 1_000_000), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=message if "ends before" not in message else "too few bytes|it ends before"):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 21
    tracemalloc.stop()


def test_idx_is_streamed(tmp_path):
    images = pictures(256, 64, 64, 1)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(256, 64, 64, values=images.tobytes()), 1))
    count, batches = stream_images(path, batch=4)
    assert count == 256
    tracemalloc.start()
    for k, batch in enumerate(batches):
        assert np.array_equal(batch, images[4 * k : 4 * k + 4])
    assert tracemalloc.get_traced_memory()[1] < images.nbytes
    tracemalloc.stop()


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_other_compressions_are_of_unknown_type(tmp_path, pack):
    (tmp_path / "x").write_bytes(pack(idx(5, 4, 6, values=bytes(120))))
    with pytest.raises(ValueError, match=r"x is of unknown type; want an .npz or .npy"):
        load_images(tmp_path / "x")


def test_a_packed_tar_says_what_is_wanted(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(ValueError, match=r"unknown type inside its gzip; want .* a .zip or a .tar$"):
        load_images(tmp_path / "x.tar.gz")


# Arguments


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, None, "3"])
def test_batches_are_counted_in_whole_numbers(tmp_path, batch):
    np.save(tmp_path / "x.npy", pictures())
    with pytest.raises(ValueError, match=r"batch is .*; want a whole number, at least 1"):
        stream_images(tmp_path / "x.npy", batch=batch)


def test_numbers_of_numpy(tmp_path):
    np.savez(tmp_path / "x.npz", x=pictures(), y=LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(streamed(tmp_path / "x.npz", batch=np.int64(2)), pictures())
        assert np.array_equal(load_labels(tmp_path / "x.npz", count=np.int32(5), classes=np.uint8(3)), LABELS)
