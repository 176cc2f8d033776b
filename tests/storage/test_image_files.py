"""Image files in folders, archives and shards: none is left out silently, and labels and names of classes are right."""

import io
import json
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from fastddpm.storage import decoding
from fastddpm.storage.classes import natural
from fastddpm.storage.datasets import image_files, load_classes, load_images, load_labels, stream_images
from fastddpm.storage.images import png
from fastddpm.storage.merge import merge
from fastddpm.storage.shards import ShardFolder


def pictures(n=5, h=4, w=6, c=3):
    return np.random.default_rng(7).integers(0, 256, (n, h, w, c), np.uint8)


def save_folder(folder, batch, names):
    for name, image in zip(names, batch, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(image))
    return folder


def save_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def save_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def packed(batch, names):
    return {name: png(image) for name, image in zip(names, batch, strict=True)}


def streamed(path, **options):
    count, batches = stream_images(path, **options)
    batches = list(batches)
    assert sum(map(len, batches)) == count
    return np.concatenate(batches)


# Files that cannot be read, or are no images


@pytest.mark.parametrize("load", [load_images, stream_images, image_files])
def test_dangling_links_are_counted_and_the_first_is_named(tmp_path, load):
    save_folder(tmp_path, pictures(1), ["0.png"])
    for i in range(1, 4):
        (tmp_path / f"{i}.png").symlink_to(f"/nowhere/{i}.png")
    first = f"the first is {tmp_path / '1.png'}, a link to /nowhere/1.png, which is not there: mount or fetch"
    with pytest.raises(ValueError, match=f"^{tmp_path}: 3 of 4 files cannot be read, {first}"):
        load(tmp_path)


def test_links_that_lead_back_are_not_followed(tmp_path):
    """Whether to a folder above, or by way of another folder."""
    save_folder(tmp_path, pictures(2), ["data/0.png", "linked/0.png"])
    for link, target in (
        ("data/up", ".."),
        ("data/itself", "."),
        ("data/link", "../linked"),
        ("linked/back", "../data"),
    ):
        (tmp_path / link).symlink_to(target)
    files = [file.relative_to(tmp_path).as_posix() for file in image_files(tmp_path / "data")]
    assert files == ["data/0.png", "data/link/0.png"]


def test_a_dangling_link_may_have_been_a_folder(tmp_path):
    save_folder(tmp_path, pictures(1), ["a/0.png"])
    (tmp_path / "b").symlink_to("/nowhere/b")
    with pytest.raises(ValueError, match=r"1 of 2 files cannot be read, the first is .*/b, a link to /nowhere/b"):
        load_images(tmp_path)


@pytest.mark.parametrize("name", ["pipe.png", "pipe"])
def test_pipes_in_a_folder_are_refused(tmp_path, name):
    save_folder(tmp_path, pictures(1), ["0.png"])
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}, a pipe or a device: write it to a file, or remove"):
        load_images(tmp_path)


@pytest.mark.parametrize("load", [load_images, stream_images, image_files, load_classes])
def test_a_pipe_is_no_data(tmp_path, load):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match="is a pipe or a device; want a file"):
        load(tmp_path / "pipe.npz")


def test_files_without_permission_are_counted(tmp_path, monkeypatch):
    save_folder(tmp_path, pictures(3), ["0.png", "1.png", "2.png"])
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith(("1.png", "2.png")))  # root may read all
    with pytest.raises(ValueError, match=r"2 of 3 files .* the first is .*1.png, whose permissions forbid it"):
        load_images(tmp_path)


def test_an_empty_image_is_named(tmp_path):
    save_folder(tmp_path, pictures(1), ["0.png"])
    (tmp_path / "1.png").touch()
    with pytest.raises(ValueError, match=r"cannot read the image .*1.png: it is empty$"):
        load_images(tmp_path)


def test_other_files_are_counted_and_the_first_is_named(tmp_path):
    save_folder(tmp_path, pictures(2), ["0.png", "1.png"])
    for name in ("a.avif", "b/c.npy", "d", "notes.txt", "labels.csv", "metadata.jsonl", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r": 3 of 8 files are left out, the first is a\.avif; the names of images end"):
        images = load_images(tmp_path)
    assert np.array_equal(images, pictures(2))
    assert len(image_files(tmp_path)) == 2  # nor do labels and classes warn: the user is told once


def test_a_folder_of_other_files_says_what_it_holds(tmp_path):
    for name in ("a.avif", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=r"holds no images: 2 of 2 files are left out, the first is a\.avif; the names"
    ):
        load_images(tmp_path)


def test_images_of_several_sizes_are_refused_without_unsafe_advice(tmp_path):
    save_folder(tmp_path, [*pictures(1), *pictures(1, 8, 9)], ["0.png", "1.png"])
    with pytest.raises(ValueError, match=r"0.png is 6x4, .*1.png is 9x8; write copies, cropped or resized") as caught:
        load_images(tmp_path)
    assert "mogrify" not in str(caught.value)


def test_images_of_several_sizes_are_streamed_by_size(tmp_path):
    small, large = pictures(5), pictures(4, 8, 9)
    order = [small[0], large[0], small[1], small[2], large[1], large[2], large[3], small[3], small[4]]
    save_folder(tmp_path, order, [f"{i}.png" for i in range(9)])
    count, batches = stream_images(tmp_path, batch=4, same_size=False)
    got = list(batches)
    assert count == 9
    want = [small[:3], large[:1], large[1:], small[3:4], small[4:]]
    assert [batch.shape for batch in got] == [batch.shape for batch in want]
    assert all(map(np.array_equal, got, want))


def test_names_that_are_not_utf_8(tmp_path):
    names = [os.fsencode(tmp_path) + b"/" + name for name in (b"\xe9t\xe9/0.png", b"\xff/1.png")]
    for name, image in zip(names, pictures(2), strict=True):
        os.makedirs(os.path.dirname(name))
        with open(name, "wb") as file:
            file.write(png(image))
    assert np.array_equal(load_images(tmp_path), pictures(2))
    classes = load_classes(tmp_path)
    assert [os.fsencode(name) for name in classes] == [b"\xe9t\xe9", b"\xff"]
    assert load_labels(tmp_path, count=2, classes=classes).tolist() == [0, 1]
    assert tuple(json.loads(json.dumps(classes))) == classes
    with open(names[1], "wb") as file:
        file.write(b"damaged")
    with pytest.raises(ValueError, match=r"cannot read the image .*1.png"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    "path", ["a\0b", "x.npz\0:y", "a" * 100_000, "\ud800", 0, None, b"x.npz", ["x.npz"], 1.5, True]
)
@pytest.mark.parametrize("load", [load_images, stream_images, image_files, load_classes])
def test_what_cannot_be_a_path(path, load):
    with pytest.raises(
        ValueError, match=r"path is|cannot be the name of a file|File name too long|cannot read"
    ) as caught:
        load(path)
    assert "embedded null" not in str(caught.value)


# Damaged metadata


def exif(orientation=6):
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = orientation, "maker" * 5
    return tags.tobytes()


def encoded(form, **options):
    buffer = io.BytesIO()
    Image.fromarray(pictures(1, 16, 24)[0]).save(
        buffer, form, **({"lossless": True} if form == "WEBP" else {}), **options
    )
    return buffer.getvalue()


def upright(form):
    with Image.open(io.BytesIO(encoded(form))) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_beside_whole_pixels(tmp_path, form):
    whole = encoded(form, exif=exif())
    at = whole.index(exif()[6:])
    damaged = bytearray(whole)
    damaged[at : at + 4] = b"oops"
    if form == "PNG":
        size = struct.unpack(">I", whole[at - 8 : at - 4])[0]
        damaged[at + size : at + size + 4] = struct.pack(">I", zlib.crc32(damaged[at - 4 : at + size]))
    for i in range(3):
        (tmp_path / f"{i}.{form}").write_bytes(damaged)
    wanted = rf"0.{form} has an EXIF orientation that cannot be read, and 2 others have the like; the pixels are whole"
    with pytest.warns(UserWarning, match=wanted):
        images = load_images(tmp_path)
    with pytest.warns(UserWarning, match=wanted):
        assert np.array_equal(streamed(tmp_path, batch=2), images)
    assert np.array_equal(images, upright(form)[None].repeat(3, axis=0))


@pytest.mark.parametrize(("at", "value"), [(4, 200), (8, 7), (26, 9)], ids=["offset", "entries", "values"])
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_warning_of_a_lost_orientation_names_the_image(tmp_path, form, at, value):
    """Pillow would only warn, without the name."""
    tiff = bytearray(exif()[6:])
    assert tiff[:2] == b"MM"
    tiff[at + 3 - 2 * (at == 8)] = value
    (tmp_path / "0.png").write_bytes(encoded(form, exif=b"Exif\0\0" + bytes(tiff)))
    with pytest.warns(UserWarning, match="an EXIF orientation that cannot be read") as told:
        load_images(tmp_path)
    assert [str(warning.message).partition(" ")[0] for warning in told] == [str(tmp_path / "0.png")]


@pytest.mark.parametrize("prefixes", [1, 2])
def test_an_empty_exif_and_a_doubled_prefix(tmp_path, prefixes):
    (tmp_path / "0.jpg").write_bytes(encoded("JPEG", exif=b"Exif\0\0"))
    assert load_images(tmp_path).shape == (1, 16, 24, 3)
    (tmp_path / "0.jpg").write_bytes(encoded("JPEG", exif=b"Exif\0\0" * prefixes + exif()[6:]))
    assert load_images(tmp_path).shape == (1, 24, 16, 3)


@pytest.mark.parametrize("chunk", [b"eXIf", b"tEXt", b"iCCP", b"pHYs", b"bKGD", b"vpAg"])
def test_png_with_a_wrong_checksum_of_metadata(tmp_path, chunk):
    info = __import__("PIL.PngImagePlugin").PngImagePlugin.PngInfo()
    info.add_text("title", "a picture")
    for name in (b"bKGD", b"vpAg"):
        info.add(name, b"\0" * 8)
    whole = bytearray(encoded("PNG", exif=exif(1), pnginfo=info, dpi=(72, 72), icc_profile=b"profile" * 9))
    whole[whole.index(chunk) + 5] ^= 1
    (tmp_path / "0.png").write_bytes(whole)
    with pytest.warns(UserWarning, match=r"0.png has metadata that cannot be read; the pixels are whole"):
        assert np.array_equal(load_images(tmp_path)[0], upright("PNG"))


def test_webp_whose_metadata_is_cut(tmp_path):
    whole = encoded("WEBP", exif=exif(1))
    (tmp_path / "0.webp").write_bytes(whole[: whole.index(b"EXIF") + 20])
    with pytest.warns(UserWarning, match=r"0.webp has metadata that cannot be read; the pixels are whole"):
        assert np.array_equal(load_images(tmp_path)[0], upright("WEBP"))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_damaged_pixels_are_refused_whatever_the_metadata(tmp_path, form):
    whole = encoded(form, exif=exif())
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read the image .*0.png: "):
        load_images(tmp_path)


@pytest.mark.parametrize("chunk", [b"PLTE", b"tRNS", b"IDAT", b"IHDR"])
def test_chunks_that_decide_the_pixels_are_no_metadata(tmp_path, chunk):
    """A palette with a damaged name must not be left out: the image would be another one."""
    grey = Image.fromarray(pictures(1, c=1)[0, ..., 0])
    buffer = io.BytesIO()
    grey.quantize(16).save(buffer, "PNG", transparency=3)
    for bit in (0x20, 0x01):
        damaged = bytearray(buffer.getvalue())
        damaged[damaged.index(chunk)] ^= bit
        (tmp_path / "0.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read the image .*0\.png: "):
            load_images(tmp_path)


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"0\.png: it is PostScript, a program that Pillow would run"):
        load_images(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_equals_pillows(tmp_path, orientation):
    from PIL import ImageOps

    (tmp_path / "0.png").write_bytes(encoded("PNG", exif=exif(orientation)))
    with Image.open(tmp_path / "0.png") as image:
        assert np.array_equal(load_images(tmp_path)[0], np.asarray(ImageOps.exif_transpose(image)))


def test_images_of_too_many_pixels_or_bytes(tmp_path, monkeypatch):
    save_folder(tmp_path, pictures(1), ["0.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"cannot read the image .*0.png: Image size \(24 pixels\) exceeds limit"):
        load_images(tmp_path)
    monkeypatch.setattr(decoding, "LARGEST", 10)
    with pytest.raises(ValueError, match=r"cannot read the image .*0.png: it has \d+ bytes; want at most 10"):
        load_images(tmp_path)


@pytest.mark.parametrize("name", ["folder", "samples"])
def test_images_that_do_not_fit_in_memory(tmp_path, monkeypatch, name):
    save_folder(tmp_path / "folder", pictures(1), ["0.png"])
    samples(tmp_path / "samples", "npz")

    def no_memory(*args):
        raise MemoryError

    monkeypatch.setattr(np, "empty" if name == "folder" else "concatenate", no_memory)
    with pytest.raises(ValueError, match=f"the images of {tmp_path / name} do not fit in memory; use fewer"):
        load_images(tmp_path / name)


# Classes


def test_natural_order():
    names = ["B", "a", "a-", "a1", "a2", "a10", "a10b", "a:", "ab", "x01", "x1", "x1.2", "x1.10", "\u0663", "\udcff"]
    backwards = names[::-1]
    assert sorted(backwards, key=natural) == names
    assert sorted(["10", "9", "010", "1", "a" * 9, "9" * 5000], key=natural)[:4] == ["1", "9", "010", "10"]
    words = ["shirt", "Bag", "coat-rack", "boot", "a b", "z_1", "ä"]
    assert sorted(words, key=natural) == sorted(words)  # names with equally long numbers keep their old order
    assert sorted(["n02", "n01", "n10"], key=natural) == ["n01", "n02", "n10"]


def numbered_folder(path, count=12, packing=None):
    """`count` folders named 0, 1, ..., with one image each, whose pixels are the number."""
    files = {f"{k}/x.png": png(np.full((2, 2, 1), k, np.uint8)) for k in range(count)}
    if packing is not None:
        return packing(path, {f"top/{name}": content for name, content in files.items()})
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True)
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("packing", [None, save_zip, save_tar])
def test_class_folders_sort_naturally(tmp_path, packing):
    path = numbered_folder(tmp_path / "in", packing=packing)
    classes = tuple(map(str, range(12)))
    assert load_classes(path) == classes
    images = load_images(path)[:, 0, 0, 0]
    for of_model in (None, classes):
        assert np.array_equal(load_labels(path, count=12, classes=of_model), images)
    with pytest.warns(
        UserWarning, match=r"taken to be 0, 1, 2, .* an older fastddpm trained has the order 0, 1, 10, 11, 2"
    ):
        assert np.array_equal(load_labels(path, count=12, classes=12), images)
    with pytest.warns(UserWarning, match="does not name its classes"):
        load_labels(path, count=12, classes=np.int64(12))


def test_the_order_of_images_is_that_of_their_names(tmp_path):
    """As ever: the images of a run that is resumed keep their places."""
    save_folder(tmp_path, pictures(3), ["1.png", "10.png", "2.png"])
    assert np.array_equal(load_images(tmp_path), pictures(3))


def test_folders_are_matched_with_the_names_of_a_model(tmp_path):
    names = ["bag/0.png", "boot/0.png", "boot/1.png"]
    save_folder(tmp_path, pictures(3), names)
    assert load_classes(tmp_path) == ("bag", "boot")
    model = ("boot", "shirt", "bag")
    assert load_labels(tmp_path, count=3, classes=model).tolist() == [2, 0, 0]
    assert load_labels(tmp_path, count=3, classes=list(model)).dtype == np.int64
    wanted = "has 1 folders that are no class of the model, the first is bag; the classes are boot, shirt: rename"
    with pytest.raises(ValueError, match=wanted):
        load_labels(tmp_path, count=3, classes=model[:2])


@pytest.mark.parametrize("classes", [0, -1, True, 1.5, "boot", [1, 2], {"boot"}, object()])
def test_classes_of_a_wrong_type(tmp_path, classes):
    save_folder(tmp_path, pictures(2), ["bag/0.png", "boot/0.png"])
    with pytest.raises(ValueError, match=r"classes (is|are) .*; want"):
        load_labels(tmp_path, count=2, classes=classes)


def test_what_has_no_class_names(tmp_path):
    save_folder(tmp_path / "loose", pictures(1), ["0.png"])
    np.savez(tmp_path / "x.npz", x=pictures(), y=np.arange(5))
    assert load_classes(tmp_path / "loose") is None
    assert load_classes(tmp_path / "x.npz") is None
    assert load_labels(tmp_path / "x.npz", count=5, classes=("a", "b", "c", "d", "e")).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="has labels from 0 to 4; want the model's, 0 to 1"):
        load_labels(tmp_path / "x.npz", count=5, classes=("a", "b"))


STYLEGAN = {"labels": [["00000/b.png", 2], ["00000/a.png", 0], ["00001/c.png", 1]]}
STYLEGAN_NAMES = ["00000/a.png", "00000/b.png", "00001/c.png"]


@pytest.mark.parametrize("packing", [None, save_zip, save_tar])
@pytest.mark.parametrize("labels", [STYLEGAN, {"labels": dict(STYLEGAN["labels"])}])
def test_labels_of_a_dataset_json(tmp_path, packing, labels):
    """The folders of such a data set are not classes."""
    path = tmp_path / "in"
    if packing:
        packing(path, {**packed(pictures(3), STYLEGAN_NAMES), "dataset.json": json.dumps(labels).encode()})
    else:
        save_folder(path, pictures(3), STYLEGAN_NAMES)
        (path / "dataset.json").write_text(json.dumps(labels))
    assert np.array_equal(load_images(path), pictures(3))
    assert load_labels(path, count=3).tolist() == [0, 2, 1]
    assert load_classes(path) is None


def test_a_dataset_json_without_labels_is_none(tmp_path):
    save_folder(tmp_path, pictures(3), STYLEGAN_NAMES)
    for held in ({"labels": None}, {}, [1], {"annotations": []}):
        (tmp_path / "dataset.json").write_text(json.dumps(held))
        assert load_labels(tmp_path, count=3).tolist() == [0, 0, 1]
        assert load_classes(tmp_path) == ("00000", "00001")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("[" * 100_000, "dataset.json is damaged; want"),
        ('{"labels": 3}', "dataset.json is damaged; want"),
        ('{"labels": [["00000/a.png"]]}', "dataset.json is damaged; want"),
        ('{"labels": [["00000/a.png", 1]]}', "2 images have no label, the first is .*b.png; want one for each"),
        (
            json.dumps({"labels": [[name, [0, 1]] for name in STYLEGAN_NAMES]}),
            r"is \[3, 2\] int64; want integers \[N\]",
        ),
        (
            json.dumps({"labels": [[name, [0] * k] for k, name in enumerate(STYLEGAN_NAMES)]}),
            "labels of several shapes",
        ),
        (json.dumps({"labels": [[name, 10**30] for name in STYLEGAN_NAMES]}), r"is \[3\] object; want integers"),
        (json.dumps({"labels": [[name, 0.5] for name in STYLEGAN_NAMES]}), r"is \[3\] float64; want integers"),
    ],
)
def test_damaged_dataset_json(tmp_path, held, message):
    save_folder(tmp_path, pictures(3), STYLEGAN_NAMES)
    (tmp_path / "dataset.json").write_text(held)
    with pytest.raises(ValueError, match=message):
        load_labels(tmp_path, count=3)


# Archives


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_of_images_equals_the_folder(tmp_path, compression):
    names = ["a/b/0.png", "a/2.PNG", "b.png"]
    files = {"b.png": None, "a/2.PNG": None, "a/b/0.png": None, "__MACOSX/._b.png": b"junk", ".x/0.png": b"junk"}
    files |= dict(zip(names, map(png, pictures(3)), strict=True)) | {"notes.txt": b"text", "a/": b""}
    path = save_zip(tmp_path / "in.zip", files, compression)
    order = [1, 0, 2]  # a/2.PNG comes before a/b/0.png
    assert np.array_equal(load_images(path), pictures(3)[order])
    assert np.array_equal(streamed(path, batch=2), pictures(3)[order])
    assert image_files(path) == [path]
    assert os.listdir(tmp_path) == ["in.zip"]


def test_many_images_of_a_zip_are_read_by_several_threads(tmp_path):
    batch = pictures(300, 16, 16)
    path = save_zip(tmp_path / "in.zip", packed(batch, [f"{i:03d}.png" for i in range(300)]))
    assert np.array_equal(streamed(path, batch=64), batch)


def test_tar_of_images_is_read_in_its_order(tmp_path):
    names = ["c.png", "a/b.png", "b.png"]
    path = save_tar(tmp_path / "in.tar", packed(pictures(3), names) | {"notes.txt": b"text"})
    assert np.array_equal(load_images(path), pictures(3))
    assert np.array_equal(streamed(path, batch=2), pictures(3))


@pytest.mark.parametrize("top", ["", "./", "data/", "./deep/data/"])
@pytest.mark.parametrize("packing", [save_zip, save_tar])
def test_labels_in_a_packed_folder(tmp_path, packing, top):
    names = ["00000/a.png", "00000/b.png", "00001/c.png"]
    labels = json.dumps({"labels": [[name, label] for name, label in zip(names, [2, 0, 1], strict=True)]}).encode()
    files = packed(pictures(3), [top + name for name in names]) | {f"{top}dataset.json": labels, "notes.txt": b""}
    path = packing(tmp_path / "packed", files)
    assert load_classes(path) is None
    assert load_labels(path, count=3).tolist() == [2, 0, 1]


def test_labels_where_they_are_not_read_are_told(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "dataset.json").write_text("{}")
    (tmp_path / "0.png").write_bytes(encoded("PNG"))
    with pytest.warns(UserWarning, match=r"1 of 2 files are left out, the first is train/dataset.json"):
        load_images(tmp_path)


def test_a_packed_folder_is_not_a_class(tmp_path):
    path = save_zip(
        tmp_path / "x.zip", packed(pictures(3), ["deep/data/a/0.png", "deep/data/a/1.png", "deep/data/b/0.png"])
    )
    assert load_classes(path) == ("a", "b")
    assert load_labels(path, count=3).tolist() == [0, 0, 1]
    path = save_tar(tmp_path / "x.tar", packed(pictures(2), ["data/0.png", "data/1.png"]))
    assert load_classes(path) is None
    with pytest.raises(ValueError, match=r"x.tar: data/0.png has no class; want each image in a folder below"):
        load_labels(path, count=2)


def test_labels_of_webdataset(tmp_path):
    files = packed(pictures(3), ["0.png", "1.png", "2.png"])
    labels = {f"{k}.cls": str(label).encode() for k, label in enumerate([1, 0, 1])}
    path = save_tar(tmp_path / "x.tar", files | labels)
    assert load_labels(path, count=3).tolist() == [1, 0, 1]
    assert load_classes(path) is None
    save_tar(path, files | {"0.cls": b"1"})
    with pytest.raises(ValueError, match=r"2 images have no label, the first is .*x.tar: 1.png; want one for each"):
        load_labels(path, count=3)
    save_tar(path, files | labels | {"1.cls": b"boot"})
    with pytest.raises(ValueError, match=r"x.tar: 1.cls holds b'boot'; want a whole number"):
        load_labels(path, count=3)


def damaged_archives(tmp_path):
    files = packed(pictures(3, 32, 32), ["0.png", "1.png", "2.png"])
    whole = save_tar(tmp_path / "whole.tar", files).read_bytes()
    second = whole.index(b"1.png")
    yield "cut.tar", whole[: len(whole) // 2]
    yield "cut between files.tar", whole[:second]
    yield "header.tar", whole[:second] + b"\xff" * 512 + whole[second + 512 :]
    whole = save_zip(tmp_path / "whole.zip", files).read_bytes()
    yield "cut.zip", whole[: len(whole) // 2]
    yield "member.zip", whole[:200] + bytes(300) + whole[500:]
    yield (
        "lzma.zip",
        (lambda x: x[:200] + b"\xff" * 300 + x[500:])(
            save_zip(tmp_path / "lzma.zip", files, zipfile.ZIP_LZMA).read_bytes()
        ),
    )


def test_damaged_archives_are_refused(tmp_path):
    for name, content in damaged_archives(tmp_path):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_images(path)


def test_archives_without_images(tmp_path):
    save_tar(tmp_path / "x.tar", {"0.npy": b"x", "1.npy": b"x"})
    with pytest.raises(ValueError, match=r"x.tar holds no images: 2 of 2 files are left out, the first is 0.npy"):
        load_images(tmp_path / "x.tar")
    save_zip(tmp_path / "x.zip", {"0.txt": b"x"})
    with pytest.raises(ValueError, match=r"cannot load .*x.zip as .npz: it holds no arrays"):
        load_images(tmp_path / "x.zip")


def test_links_in_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "0.png"), (tarfile.LNKTYPE, "1.png"), (tarfile.FIFOTYPE, "2.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    with pytest.raises(ValueError, match=r"x.tar: 3 images are links or pipes, one is 0.png; pack the files"):
        load_images(tmp_path / "x.tar")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        member = zipfile.ZipInfo("0.png")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(ValueError, match=r"x.zip: 1 images are links or pipes, one is 0.png; pack the files"):
        load_images(tmp_path / "x.zip")


def test_a_member_of_many_bytes_is_not_unpacked(tmp_path, monkeypatch):
    save_zip(tmp_path / "x.zip", {"0.png": bytes(1000)})
    monkeypatch.setattr(decoding, "LARGEST", 999)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *args: pytest.fail("it is unpacked"))
    with pytest.raises(ValueError, match=r"x.zip: 0.png: it has 1000 bytes; want at most 999"):
        load_images(tmp_path / "x.zip")


# Samples


def samples(folder, form, labels="2,0,1", shape=(4, 6, 3)):
    manifest = {
        "format": form,
        "samples": "0-10",
        "shard_size": 4,
        "class_labels": labels,
        "shape": [shape[2], *shape[:2]],
    }
    store = ShardFolder(folder, manifest)
    store.begin()
    for k in range(len(store)):
        store.write(k, pictures(11, *shape)[k * 4 : k * 4 + 4])
    return store


@pytest.mark.parametrize("form", ["npz", "webdataset", "png"])
def test_samples_are_data(tmp_path, form):
    samples(tmp_path / "in", form)
    want, labels = pictures(11), [2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert np.array_equal(load_images(tmp_path / "in"), want)
    assert np.array_equal(streamed(tmp_path / "in", batch=3), want)
    assert load_labels(tmp_path / "in", count=11).tolist() == labels
    assert load_classes(tmp_path / "in") is None
    assert all(file.is_file() for file in image_files(tmp_path / "in"))
    for out in ("out.tar", "out.npz"):
        merge([tmp_path / "in"], tmp_path / out, progress=False)
        assert np.array_equal(load_images(tmp_path / out), want)
        assert np.array_equal(streamed(tmp_path / out, batch=3), want)
        assert load_labels(tmp_path / out, count=11).tolist() == labels


def test_unfinished_or_unlabelled_samples(tmp_path):
    store = samples(tmp_path / "in", "webdataset", labels=None)
    with pytest.raises(ValueError, match="in has no class labels"):
        load_labels(tmp_path / "in", count=11)
    next(store.path.glob("00001.tar")).unlink()
    with pytest.raises(ValueError, match="shard 1 of 3"):
        load_images(tmp_path / "in")
