"""Images and class labels: each kind of source gives the same array, each kind of damage a one-line error."""

import gzip
import os
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.storage import datasets, image_files
from fastddpm.storage.datasets import array_name, load_images, load_labels, stream_images


def pictures(n=5, h=4, w=6, c=3):
    return np.random.default_rng(7).integers(0, 256, (n, h, w, c), np.uint8)


def idx(array, kind=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def save_folder(folder, batch, names):
    for name, image in zip(names, batch, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(folder / name)
    return folder


def error(path, load=load_images, **options):
    """The error of loading path, which must be one line that names the path."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["x_train", "x", "arr_0", "images", "anything"])
@pytest.mark.parametrize("c", [1, 3])
def test_npz(tmp_path, name, c):
    np.savez(tmp_path / "data.npz", **{name: pictures(c=c)})
    assert np.array_equal(load_images(tmp_path / "data.npz"), pictures(c=c))


def test_npz_prefers_the_training_set(tmp_path):
    np.savez_compressed(
        tmp_path / "data", x_test=pictures(2), images=pictures(3), x_train=pictures(4), y_train=np.arange(4)
    )
    assert np.array_equal(load_images(tmp_path / "data.npz"), pictures(4))


def test_npz_without_channels(tmp_path):
    np.savez(tmp_path / "data.npz", pictures()[..., 0])
    assert np.array_equal(load_images(tmp_path / "data.npz"), pictures()[..., :1])


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
@pytest.mark.parametrize("c", [None, 1, 3])
def test_idx(tmp_path, pack, c):
    want = pictures(c=c or 1)
    (tmp_path / "images-idx3-ubyte").write_bytes(pack(idx(want if c else want[..., 0])))
    got = load_images(tmp_path / "images-idx3-ubyte")
    assert np.array_equal(got, want)
    assert np.array_equal(torch.from_numpy(got), want)  # torch warns of read-only memory


@pytest.mark.parametrize("c", [1, 3])
def test_folder_is_read_in_sorted_order_with_subfolders(tmp_path, c):
    names = ["a/2.png", "a/b/0.bmp", "b.PNG", "c 1.png", "ü.png"]
    save_folder(tmp_path, pictures(c=c), names)
    (tmp_path / "labels.csv").write_text("not an image")
    save_folder(tmp_path, pictures(1), [".thumbnails/x.png"])
    assert np.array_equal(load_images(tmp_path), pictures(c=c))


def test_folder_of_grey_and_colour_is_colour(tmp_path):
    colour, grey = pictures(4), pictures(4, c=1)
    for i in range(4):
        save_folder(tmp_path, [grey[i] if i % 2 == 0 else colour[i]], [f"{i}.png"])
    want = np.stack([grey[i].repeat(3, axis=2) if i % 2 == 0 else colour[i] for i in range(4)])
    assert np.array_equal(load_images(tmp_path), want)


def test_folder_of_other_modes(tmp_path):
    rgb = Image.fromarray(pictures(1)[0])
    rgb.save(tmp_path / "0.png")
    rgb.convert("RGBA").save(tmp_path / "1.png")
    palette = rgb.quantize(64)
    palette.save(tmp_path / "2.png")
    want = np.stack([pictures(1)[0], pictures(1)[0], np.asarray(palette.convert("RGB"))])
    assert np.array_equal(load_images(tmp_path), want)


def test_black_and_white_becomes_grey(tmp_path):
    bits = pictures(1, c=1)[0, ..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "0.png")
    assert np.array_equal(load_images(tmp_path)[0, ..., 0], bits * 255)


@pytest.mark.parametrize("mode", ["LA", "L"])
def test_grey_with_transparency_is_grey(tmp_path, mode):
    grey = pictures(1, c=1)[0, ..., 0]
    picture = Image.fromarray(grey)
    if mode == "LA":
        picture.putalpha(Image.fromarray(255 - grey))
    picture.save(tmp_path / "0.png", **({"transparency": 7} if mode == "L" else {}))
    with Image.open(tmp_path / "0.png") as saved:
        assert (saved.mode, "transparency" in saved.info) == (mode, mode == "L")
    assert np.array_equal(load_images(tmp_path)[0, ..., 0], grey)


def test_a_grey_palette_counts_as_colour(tmp_path):
    grey = Image.fromarray(pictures(1, c=1)[0, ..., 0])
    grey.convert("P").save(tmp_path / "0.png")
    assert np.array_equal(load_images(tmp_path)[0], np.asarray(grey)[..., None].repeat(3, axis=2))


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned clockwise by 90 degrees
    Image.fromarray(pictures(1)[0]).save(tmp_path / "0.png", exif=exif)
    Image.fromarray(np.rot90(pictures(1)[0], -1)).save(tmp_path / "1.png")
    upright, again = load_images(tmp_path)
    assert upright.shape == (6, 4, 3)
    assert np.array_equal(upright, again)


def test_folders_with_the_name_of_an_image_are_searched(tmp_path):
    save_folder(tmp_path, pictures(1), ["folder.png/a.png"])
    (tmp_path / "link.png").symlink_to("folder.png/a.png")
    assert np.array_equal(load_images(tmp_path), pictures(1).repeat(2, axis=0))


def test_links_to_folders_are_followed_unless_they_form_a_cycle(tmp_path):
    save_folder(tmp_path / "elsewhere", pictures(2), ["0.png", "deeper/1.png"])
    (tmp_path / "data" / "b").mkdir(parents=True)
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "deeper" / "self").symlink_to(".")
    assert np.array_equal(load_images(tmp_path / "data"), pictures(2))


def test_unreadable_subfolder_is_an_error(tmp_path, monkeypatch):
    save_folder(tmp_path, pictures(2), ["a/0.png", "b/1.png"])
    scandir = os.scandir

    def denied(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert error(tmp_path) == f"cannot read {tmp_path / 'b'}: Permission denied"


def test_many_files_show_progress(tmp_path, capfd):
    save_folder(tmp_path, np.zeros((1001, 1, 1, 1), np.uint8), [f"{i}.png" for i in range(1001)])
    assert len(load_images(tmp_path)) == 1001
    assert "reading images: 100%" in capfd.readouterr().err
    assert len(load_images(tmp_path, progress=False)) == 1001
    assert capfd.readouterr() == ("", "")


def test_missing_path(tmp_path, monkeypatch):
    assert "No such file" in error(tmp_path / "absent.npz")
    save_folder(tmp_path, pictures(1), ["0.png"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^path is ''; want an .npz.*$"):
        load_images("")


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x89PNG\r\n\x1a\n", b"\0", b"\0\0"])
def test_unknown_type(tmp_path, content):
    (tmp_path / "file.npz").write_bytes(content)
    assert "unknown type; want an .npz" in error(tmp_path / "file.npz")


def test_folder_without_images(tmp_path):
    (tmp_path / "readme.txt").touch()
    assert "holds no images" in error(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif"])
def test_corrupt_image_is_named(tmp_path, suffix):
    noise = Image.fromarray(pictures(1, 64, 64)[0])
    noise.save(tmp_path / f"good.{suffix}")
    whole = (tmp_path / f"good.{suffix}").read_bytes()
    (tmp_path / f"truncated.{suffix}").write_bytes(whole[: len(whole) // 2])
    assert f"truncated.{suffix}" in error(tmp_path)
    (tmp_path / f"truncated.{suffix}").unlink()
    (tmp_path / f"text.{suffix}").write_text("no image")
    assert f"text.{suffix}" in error(tmp_path)


def test_16_bit_image_is_named(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    message = error(tmp_path)
    assert "deep.png" in message
    assert "want 8 bits" in message


def test_mixed_sizes_name_two_files_and_suggest_resizing(tmp_path):
    save_folder(tmp_path, pictures(2), ["0.png", "1.png"])
    save_folder(tmp_path, pictures(1, 8, 9), ["2.png"])
    message = error(tmp_path)
    assert "0.png is 6x4" in message
    assert "2.png is 9x8" in message
    assert "resize" in message


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 4, 4, 3), np.int64),
        np.zeros((4, 4), np.uint8),
        np.zeros((2, 3, 32, 32), np.uint8),
        np.zeros((2, 2, 4, 4, 3), np.uint8),
    ],
)
def test_npz_of_wrong_shape_or_dtype(tmp_path, array):
    np.savez(tmp_path / "x.npz", x=array)
    message = error(tmp_path / "x.npz")
    assert f"x is {list(array.shape)} {array.dtype}; want uint8" in message


NUMBERS = np.float32([0.0, 0.5, 0.25, 1.0]).reshape(1, 2, 2, 1)


@pytest.mark.parametrize(
    ("array", "way_out"),
    [
        (NUMBERS, "convert it: (x * 255).round().astype('uint8')"),
        (NUMBERS * 2 - 1, "convert it: ((x + 1) * 127.5).round().astype('uint8')"),
        (NUMBERS * 255, "convert it: x.round().astype('uint8')"),
        ((NUMBERS * 255).round().astype(int), "convert it: x.round().astype('uint8')"),
        (pictures().transpose(0, 3, 1, 2), "move its channels: x.transpose(0, 2, 3, 1)"),
    ],
    ids=["0..1", "-1..1", "0..255", "integers", "channels first"],
)
def test_npz_of_other_numbers_suggests_a_conversion(tmp_path, array, way_out):
    np.savez(tmp_path / "x.npz", x=array)
    message = error(tmp_path / "x.npz")
    assert message.endswith(f"; {way_out}")
    converted = eval(way_out.partition(": ")[2], {"x": array})
    np.savez(tmp_path / "x.npz", x=converted)
    got = load_images(tmp_path / "x.npz")
    assert np.array_equal(got, pictures() if got.shape[3] == 3 else [[[[0], [128]], [[64], [255]]]])


@pytest.mark.parametrize(
    "array",
    [NUMBERS * np.nan, NUMBERS * 1000, NUMBERS > 0.5, NUMBERS[0, ..., 0], NUMBERS[:0]],
    ids=["nan", "beyond 255", "bool", "one image", "empty"],
)
def test_no_conversion_is_suggested_for_other_arrays(tmp_path, array):
    np.savez(tmp_path / "x.npz", x=array)
    assert error(tmp_path / "x.npz").endswith("with C = 1, 3 or 4")


def test_images_of_zeros_and_ones_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=pictures() // 128)
    assert error(tmp_path / "x.npz").endswith("x holds only 0 and 1, almost black in 0..255; multiply it by 255")
    np.savez(tmp_path / "x.npz", x=np.zeros_like(pictures()))
    assert not load_images(tmp_path / "x.npz").any()


def test_encrypted_npz(tmp_path):
    np.savez(tmp_path / "x.npz", x=pictures())
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    whole[6] |= 1  # the flag in both headers of the zip's only member
    whole[whole.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.npz").write_bytes(whole)
    assert "encrypted" in error(tmp_path / "x.npz")


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (3, 0, 4, 1), (0, 4, 4)])
def test_empty_npz(tmp_path, shape):
    np.savez(tmp_path / "x.npz", x=np.zeros(shape, np.uint8))
    assert "holds no images" in error(tmp_path / "x.npz")


def test_npz_with_several_unknown_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", one=pictures(), two=pictures())
    assert "it holds one, two; want an array named x_train" in error(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz")
    assert "it holds no arrays; want an array named x_train" in error(tmp_path / "x.npz")


def test_npz_is_never_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}], object))
    assert "x holds Python objects, which are not loaded because loading can run code" in error(tmp_path / "x.npz")


def test_truncated_npz(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", pictures(100))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:-100])
    assert "cannot load" in error(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(whole[:200] + bytes(100) + whole[300:])
    assert "cannot load" in error(tmp_path / "x.npz")


def test_truncated_idx(tmp_path):
    whole, path = idx(pictures()[..., 0]), tmp_path / "idx"
    for length, why in [
        (8, "header ends after 8 bytes"),
        (len(whole) - 1, "holds 119 bytes"),
        (len(whole) + 1, "holds 121 bytes"),
    ]:
        path.write_bytes((whole + b"\0")[:length])
        assert why in error(path)
    for packed in (gzip.compress(whole)[:-20], gzip.compress(whole)[:12], gzip.compress(whole)[:-8] + bytes(8)):
        path.write_bytes(packed)
        assert "truncated or damaged" in error(path)


def test_idx_that_is_not_images(tmp_path):
    (tmp_path / "idx").write_bytes(gzip.compress(idx(np.arange(10, dtype=np.uint8))))
    assert "1 dimensions" in error(tmp_path / "idx")
    (tmp_path / "idx").write_bytes(idx(np.zeros((2, 3, 4), ">i4"), kind=0x0C))
    assert "type 0x0c" in error(tmp_path / "idx")
    (tmp_path / "idx").write_bytes(gzip.compress(b"something else"))
    assert "unknown type" in error(tmp_path / "idx")
    (tmp_path / "idx").write_bytes(idx(np.zeros((0, 3, 4), np.uint8)))
    assert "holds no images" in error(tmp_path / "idx")


LABELS = np.array([2, 0, 1, 1, 0])


def labels_error(path, count=5):
    return error(path, load_labels, count=count)


def assert_labels(got, want=LABELS):
    assert got.dtype == np.int64
    assert np.array_equal(got, want)


@pytest.mark.parametrize("names", ["x_train y_train", "x y", "arr_0 arr_1", "images labels"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64, ">i2"], ids=str)
def test_npz_labels(tmp_path, names, dtype):
    images, labels = names.split()
    np.savez(tmp_path / "x.npz", **{images: pictures(), labels: LABELS.astype(dtype), "y_test": [7]})
    assert_labels(load_labels(tmp_path / "x.npz", count=5))
    np.savez(tmp_path / "x.npz", **{images: pictures(), labels: LABELS.astype(dtype)[:, None]})
    assert_labels(load_labels(tmp_path / "x.npz", count=5))


def test_npz_labels_belong_to_the_images(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=pictures(), y_train=LABELS, x=pictures(), y=LABELS[::-1], labels=LABELS + 1)
    assert_labels(load_labels(tmp_path / "x.npz", count=5))
    np.savez(tmp_path / "x.npz", x_train=pictures(), y=LABELS)
    assert "it holds x_train, y; want labels of x_train in an array named y_train" in labels_error(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", pictures=pictures())
    assert "want labels of pictures in an array named labels" in labels_error(tmp_path / "x.npz")


def test_held_out_images_come_from_x_test(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x_train=pictures(), y_train=LABELS, x_test=pictures(3)[::-1], y_test=LABELS[:3])
    assert np.array_equal(load_images(path), pictures())
    assert np.array_equal(load_images(path, held_out=True), pictures(3)[::-1])
    assert_labels(load_labels(path, count=3, held_out=True), LABELS[:3])
    assert [array_name(path, held_out=held_out) for held_out in (False, True)] == ["x_train", "x_test"]
    np.savez(path, x=pictures(), y=LABELS)
    assert np.array_equal(load_images(path, held_out=True), pictures())
    assert_labels(load_labels(path, count=5, held_out=True))
    assert array_name(path, held_out=True) == "x"
    assert array_name(tmp_path) is None


def test_not_every_class_of_a_model_need_occur(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=pictures(), y=LABELS + 1)
    assert "has labels from 1 to 3, but none is 0" in labels_error(path)
    assert_labels(load_labels(path, count=5, classes=4), LABELS + 1)
    for wrong in (LABELS - 1, LABELS + 2):
        np.savez(path, x=pictures(), y=wrong)
        line = error(path, load_labels, count=5, classes=4)
        assert line.endswith(f"y has labels from {wrong.min()} to {wrong.max()}; want the model's, 0 to 3")
    np.savez(path, x=pictures(), y=LABELS - 1)
    assert labels_error(path).endswith("y has the label -1; want 0, 1, ..., each of them at least once")
    folder = tmp_path / "folder"
    save_folder(folder, pictures(), ["b/0.png", "b/1.png", "b/2.png", "c/0.png", "c/1.png"])
    assert_labels(load_labels(folder, count=5, classes=2), [0, 0, 0, 1, 1])
    line = error(folder, load_labels, count=5, classes=3)
    assert "has 2 folders with images, but the model has 3 classes, which are the folders" in line


@pytest.mark.parametrize("pack_images", [gzip.compress, bytes])
@pytest.mark.parametrize("pack", [gzip.compress, bytes])
@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
        ("my-images-idx4", "my-labels-idx1"),
    ],
)
def test_idx_labels(tmp_path, images, labels, pack, pack_images):
    folder = tmp_path / "images"  # must not be renamed
    folder.mkdir()
    suffix = {gzip.compress: ".gz", bytes: ""}
    path = folder / f"{images}{suffix[pack_images]}"
    path.write_bytes(pack_images(idx(pictures())))
    assert labels_error(path) == f"{path} has no labels beside it; want {folder / labels} or the same with .gz"
    (folder / f"{labels}{suffix[pack]}").write_bytes(pack(idx(LABELS.astype(np.uint8))))
    assert_labels(load_labels(path, count=len(load_images(path))))


def test_damaged_idx_labels(tmp_path):
    images, labels = tmp_path / "a-images", tmp_path / "a-labels"
    images.write_bytes(idx(pictures()))
    labels.write_bytes(idx(pictures()))
    assert "a-labels has 4 dimensions of type 0x08; want labels: 1 of type 0x08" in error_of_labels(images)
    labels.write_bytes(idx(LABELS.astype(np.uint8))[:-1])
    assert "a-labels holds 4 bytes of labels, but its header says 5" in error_of_labels(images)
    labels.write_bytes(gzip.compress(idx(LABELS.astype(np.uint8)))[:-9])
    assert "truncated or damaged" in error_of_labels(images)
    (tmp_path / "pictures").write_bytes(idx(pictures()))
    message = labels_error(tmp_path / "pictures")
    assert "has no 'images' in its name that 'labels' could replace; rename it, for example to train-images" in message


def error_of_labels(images):
    with pytest.raises(ValueError, match="a-labels") as caught:
        load_labels(images, count=5)
    return str(caught.value)


def test_folder_labels_are_the_top_folders(tmp_path):
    """Numbered in sorted order; empty and hidden folders, and those without images, are not classes."""
    names = ["B/1.png", "a/2.png", "a/9/0.png", "ab/1.png", "c/0.png"]
    save_folder(tmp_path, pictures(), names)
    for other in (".hidden/x.png", "a/.x/x.png"):
        save_folder(tmp_path, pictures(1), [other])
    (tmp_path / "aa" / "b").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").touch()
    assert np.array_equal(load_images(tmp_path), pictures())
    assert_labels(load_labels(tmp_path, count=5), [0, 1, 1, 2, 3])


def test_folder_without_classes(tmp_path):
    save_folder(tmp_path, pictures(2), ["a/0.png", "1.png"])
    assert f"{tmp_path / '1.png'} has no class; want each image in a folder" in labels_error(tmp_path)
    (tmp_path / "1.png").unlink()
    assert "has a single class; train without labels, or give the folder above" in labels_error(tmp_path, 1)
    (tmp_path / "a" / "0.png").unlink()
    assert "holds no images" in labels_error(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:4], "holds 4 labels, but there are 5 images; want one for each"),
        (LABELS[:0], "holds 0 labels, but there are 5 images"),
        (LABELS.astype(np.float32), "is [5] float32; want integers [N]"),
        (LABELS > 0, "is [5] bool; want integers [N]"),
        (np.array(["shoe", "shirt", "hat", "hat", "shoe"]), "is [5] <U5; want integers [N]"),
        (np.eye(3, dtype=int)[LABELS], "is [5, 3] int64; want integers [N]; number classes with np.unique"),
        (np.int64(3), "is [] int64; want"),
        (LABELS + 1, "has labels from 1 to 3, but none is 0; number the classes 0, 1, ..."),
        (LABELS - 1, "has the label -1; want 0, 1, ..."),
        (LABELS * 3, "has labels from 0 to 6, but none is 1"),
        (LABELS.astype(np.uint64) << 62, f"has labels from 0 to {2 << 62}, but none is 1"),
        (LABELS * 0, "has a single class; train without labels"),
    ],
)
def test_labels_that_are_not_classes(tmp_path, labels, message):
    np.savez(tmp_path / "x.npz", x=pictures(), y=labels)
    assert f"x.npz: y {message}" in labels_error(tmp_path / "x.npz")


def test_labels_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", x=pictures(), y=np.array([1, 2, 3, 4, "5"], object))
    assert "y holds Python objects, which are not loaded because" in labels_error(tmp_path / "x.npz")


def test_labels_of_a_missing_or_unknown_file(tmp_path):
    assert "No such file" in labels_error(tmp_path / "absent")
    (tmp_path / "text").write_text("text")
    assert "unknown type" in labels_error(tmp_path / "text")


# Streaming


def streamed(path, **options):
    """All images that are streamed, after checks of the batches."""
    count, batches = stream_images(path, **options)
    batches = list(batches)
    size = options.get("batch", 128)
    assert [len(batch) for batch in batches] == [size] * (count // size) + [count % size] * (count % size > 0)
    assert all(batch.dtype == np.uint8 and batch.flags.writeable for batch in batches)
    return np.concatenate(batches)


@pytest.mark.parametrize("batch", [1, 2, 5, 128])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("c", [None, 1, 3, 4])
def test_streamed_npz_equals_loaded_npz(tmp_path, batch, save, c):
    images = pictures(c=c or 1)
    save(tmp_path / "x.npz", x_train=images if c else images[..., 0], x_test=images[::-1])
    assert np.array_equal(streamed(tmp_path / "x.npz", batch=batch), images)
    assert np.array_equal(streamed(tmp_path / "x.npz", batch=batch, array="x_test"), images[::-1])


@pytest.mark.parametrize("order", [np.asfortranarray, lambda x: x])
def test_npz_in_any_memory_order(tmp_path, order):
    np.savez(tmp_path / "x.npz", order(pictures()))
    assert np.array_equal(streamed(tmp_path / "x.npz", batch=2), pictures())


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_streamed_idx_equals_loaded_idx(tmp_path, pack):
    (tmp_path / "images").write_bytes(pack(idx(pictures())))
    assert np.array_equal(streamed(tmp_path / "images", batch=2), pictures())


@pytest.mark.parametrize("count", [1, 63, 65, 150])
def test_folder_is_streamed_in_order(tmp_path, count):
    save_folder(tmp_path, pictures(count), [f"{i:03d}.png" for i in range(count)])
    assert np.array_equal(streamed(tmp_path, batch=20), pictures(count))
    assert np.array_equal(load_images(tmp_path), pictures(count))
    assert datasets.image_files(tmp_path) == [tmp_path / f"{i:03d}.png" for i in range(count)]


def test_few_images_are_decoded_ahead(tmp_path, monkeypatch):
    """However large the folder is."""
    save_folder(tmp_path, pictures(200), [f"{i:03d}.png" for i in range(200)])
    decoded, decode = [], image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda file: decoded.append(file) or decode(file))
    _, batches = stream_images(tmp_path, batch=8)
    next(batches)
    batches.close()
    assert 8 <= len(decoded) <= 8 * 9 + 8


def test_npz_is_read_only_as_far_as_needed(tmp_path):
    """Damage after the first batch is found only after that batch was yielded."""
    images = pictures(500, 16, 16)
    np.savez(tmp_path / "x.npz", images)
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    whole[-1000] ^= 1
    (tmp_path / "x.npz").write_bytes(whole)
    count, batches = stream_images(tmp_path / "x.npz", batch=100)
    assert count == 500
    assert np.array_equal(next(batches), images[:100])
    assert "Bad CRC-32" in error(tmp_path / "x.npz", lambda path: list(batches))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("images", [pictures(), np.full((500, 32, 32, 3), 7, np.uint8)], ids=["few", "smooth"])
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_wrong_checksum_is_found_at_the_end(tmp_path, save, images, batch):
    path = tmp_path / "x.npz"
    save(path, images)
    whole = bytearray(path.read_bytes())
    whole[whole.rindex(b"PK\1\2") + 16] ^= 1
    path.write_bytes(whole)
    assert "Bad CRC-32" in error(path, lambda path: list(stream_images(path, batch=batch)[1]))


def test_grey_images_in_a_batch_with_coloured_ones_become_coloured(tmp_path):
    colour, grey = pictures(4), pictures(4, c=1)
    save_folder(tmp_path, [grey[0], grey[1], grey[2], colour[3]], [f"{i}.png" for i in range(4)])
    _, batches = stream_images(tmp_path, batch=2)
    first, second = batches
    assert np.array_equal(first, grey[:2])
    assert np.array_equal(second, [grey[2].repeat(3, axis=2), colour[3]])


def test_missing_or_wrong_array(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=pictures(), y_train=LABELS)
    message = error(tmp_path / "x.npz", stream_images, array="x_test")
    assert message.endswith("it holds x_train, y_train, but no x_test")
    assert "y_train is [5] int64; want uint8" in error(tmp_path / "x.npz", stream_images, array="y_train")
    (tmp_path / "idx").write_bytes(idx(pictures()))
    assert error(tmp_path / "idx", stream_images, array="x") == f"{tmp_path / 'idx'} is not an .npz; leave out :x"
    with pytest.raises(ValueError, match="array is 0; want the name of an array, or None"):
        stream_images(tmp_path / "idx", array=0)
    with pytest.raises(ValueError, match="held_out is 'no'; want True or False"):
        load_images(tmp_path / "idx", held_out="no")


def stream_all(path):
    return list(stream_images(path)[1])


@pytest.mark.parametrize(
    "array",
    [
        NUMBERS,
        NUMBERS * 255,
        pictures().transpose(0, 3, 1, 2),
        pictures()[:0],
        pictures() // 128,
        np.array([{}], object),
    ],
    ids=["0..1", "0..255", "channels first", "empty", "zeros and ones", "pickled"],
)
def test_streaming_refuses_the_same_arrays_as_loading(tmp_path, array):
    np.savez(tmp_path / "x.npz", x=array)
    assert error(tmp_path / "x.npz", stream_all) == error(tmp_path / "x.npz")


def test_streaming_damaged_files(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, one=pictures(), two=pictures())
    assert error(path, stream_all) == error(path)
    path.write_bytes(b"PK but not a zip")
    assert "cannot load" in error(path, stream_all)
    with zipfile.ZipFile(path, "w") as archive:
        np.savez(tmp_path / "whole.npz", x=pictures())
        with zipfile.ZipFile(tmp_path / "whole.npz") as whole:
            archive.writestr("x.npy", whole.read("x.npy")[:-7])
    assert "x holds 353 bytes of values, but its header says [5, 4, 6, 3] uint8" in error(path, stream_all)
    save_folder(tmp_path / "folder", [*pictures(1, 8, 9), *pictures(1)], ["a.png", "b.png"])
    assert error(tmp_path / "folder", stream_all) == error(tmp_path / "folder")
    assert "No such file" in error(tmp_path / "absent", stream_all)
    assert "No such file" in error(tmp_path / "absent", datasets.image_files)


def test_array_name_does_not_read_the_array(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", x_train=pictures())
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", None)
    assert array_name(tmp_path / "x.npz") == "x_train"
