"""Shards: read as written, the same bytes each time, complete or missing, and never mixed with other samples."""

import io
import json
import os
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm.storage import files
from fastddpm.storage.indices import LIMIT
from fastddpm.storage.shards import FORMATS, ShardFolder, in_short, is_shard_folder
from tests.support.check import error_line
from tests.support.jobs import contents

MANIFEST = {"format": "npz", "samples": "0-10", "shard_size": 4, "class_labels": None, "seed": 0}
PICTURES = [(3, 2, 1), (2, 3, 3), (2, 2, 4)]
FLOATS = [(2, 5), (3,), (5, 2, 2), (1, 4, 4)]
SHAPES = [(form, shape) for form in FORMATS for shape in [*PICTURES, *FLOATS] if form != "png" or shape in PICTURES]


def drawn(n, shape, seed=0):
    """What a job writes: uint8 images, or floats of another shape."""
    random = np.random.default_rng(seed)
    if shape in PICTURES:
        return random.integers(0, 256, (n, *shape), np.uint8)
    return random.standard_normal((n, *shape), np.float32)


def written(folder, shape=(3, 2, 1), **manifest):
    """(a finished folder, the samples in it)."""
    store = ShardFolder(folder, {**MANIFEST, **manifest})
    store.begin()
    samples = drawn(len(store.samples), shape)
    for k in range(len(store)):
        store.write(k, samples[k * store.shard_size : (k + 1) * store.shard_size])
    return store, samples


def names(folder, suffix):
    return sorted(name for name in os.listdir(folder) if name.endswith(suffix))


@pytest.mark.parametrize(("form", "shape"), SHAPES)
@pytest.mark.parametrize("labels", [None, "2,0,1"])
def test_samples_are_read_as_they_were_written(tmp_path, form, shape, labels):
    """The bytes do not depend on the time or the machine."""
    for folder in ("one", "other"):
        store, samples = written(tmp_path / folder, shape, format=form, class_labels=labels)
    again = ShardFolder.open(tmp_path / "one")
    assert (len(again), [again.count(k) for k in range(3)]) == (3, [4, 4, 3])
    assert [list(again.indices(k)) for k in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for k, part in enumerate(again.arrays()):
        assert part.dtype == samples.dtype
        assert np.array_equal(part, samples[4 * k : 4 * k + 4])
        assert np.array_equal(part, store.read(k))
        assert again.is_done(k)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize("shape", [*PICTURES, *FLOATS])
def test_npz_holds_arrays_and_labels_as_numpy_writes_them(tmp_path, shape):
    _, samples = written(tmp_path, shape, class_labels="2,0,1")
    assert names(tmp_path, ".npz") == ["00000.npz", "00001.npz", "00002.npz"]
    for k, labels in enumerate(([2, 0, 1, 2], [0, 1, 2, 0], [1, 2, 0])):
        buffer = io.BytesIO()
        np.savez(buffer, samples[4 * k : 4 * k + 4], np.array(labels))
        assert (tmp_path / f"0000{k}.npz").read_bytes() == buffer.getvalue()
        with np.load(tmp_path / f"0000{k}.npz") as arrays:
            assert arrays["arr_1"].dtype == np.int64


def test_npz_without_labels_has_one_array(tmp_path):
    written(tmp_path)
    with np.load(tmp_path / "00002.npz") as arrays:
        assert arrays.files == ["arr_0"]


@pytest.mark.parametrize("shape", [*PICTURES, *FLOATS])
def test_tar_has_the_layout_of_webdataset(tmp_path, shape):
    """Files of one sample are adjacent and differ only in the suffix; they have no time and no owner."""
    _, samples = written(tmp_path, shape, format="webdataset", samples="7,20-29,3", class_labels="2,0,1")
    indices = [7, *range(20, 30), 3]
    assert names(tmp_path, ".tar") == ["00000.tar", "00001.tar", "00002.tar"]
    suffix = "png" if shape in PICTURES else "npy"
    place = 0
    for k in range(3):
        with tarfile.open(tmp_path / f"0000{k}.tar") as tar:
            members = tar.getmembers()
            shard = indices[4 * k : 4 * k + 4]
            assert [member.name for member in members] == [f"{i:05d}.{end}" for i in shard for end in (suffix, "cls")]
            for data, label in zip(members[::2], members[1::2], strict=True):
                content = io.BytesIO(tar.extractfile(data).read())
                got = np.load(content) if suffix == "npy" else np.asarray(Image.open(content))
                assert np.array_equal(got.reshape(shape), samples[place])
                assert got.dtype == samples.dtype
                assert tar.extractfile(label).read() == b"%d" % (2, 0, 1)[place % 3]
                place += 1
            owners = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members}
            assert owners == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}
    assert place == 12


@pytest.mark.parametrize("shape", PICTURES)
def test_png_is_named_by_its_sample_index(tmp_path, shape):
    _, samples = written(tmp_path, shape, format="png", samples="7,20-22,3")
    assert names(tmp_path, ".png") == ["00003.png", "00007.png", "00020.png", "00021.png", "00022.png"]
    for index, sample in zip((7, 20, 21, 22, 3), samples, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{index:05d}.png")).reshape(shape), sample)
    assert names(tmp_path, ".json") == ["manifest.json"]


@pytest.mark.parametrize(
    ("samples", "size", "digits"),
    [("0-99999", 7, 5), ("0-100000", 7, 6), (f"3,{LIMIT - 1}", 1, 17), ("5", 10**9, 5)],
)
@pytest.mark.parametrize("form", FORMATS)
def test_names_are_as_wide_as_the_largest_index(tmp_path, form, samples, size, digits):
    store = ShardFolder(tmp_path, {**MANIFEST, "format": form, "samples": samples, "shard_size": size})
    store.begin()
    last = len(store) - 1
    store.write(last, drawn(store.count(last), (3, 2, 1)))
    found = names(tmp_path, FORMATS[form])
    assert len(found) == (store.count(last) if form == "png" else 1)
    assert {len(name) for name in found} == {digits + 4}
    number = store.indices(last)[0] if form == "png" else last
    assert found[0] == f"{number:0{digits}d}{FORMATS[form]}"
    assert os.listdir(tmp_path / ".shards") == [f"{last:0{digits}d}"]
    assert store.read(last).shape == (store.count(last), 3, 2, 1)
    if form == "webdataset":
        with tarfile.open(tmp_path / found[0]) as tar:
            assert {len(name) for name in tar.getnames()} == {digits + 4}


def test_names_are_as_wide_as_the_number_of_shards():
    store = ShardFolder(
        "folder", {**MANIFEST, "samples": "0-99999," * 3, "shard_size": 2}
    )  # which holds each sample thrice
    assert (len(store), store.digits) == (150_000, 6)
    assert ShardFolder("folder", {**MANIFEST, "samples": "0-99999," * 2, "shard_size": 2}).digits == 5  # 0 to 99999


def test_labels_continue_from_shard_to_shard(tmp_path):
    store = ShardFolder(tmp_path, {**MANIFEST, "samples": "50-60", "class_labels": "2,0,1,1,5"})
    labels = [store.labels(k) for k in range(3)]
    assert [part.tolist() for part in labels] == [[2, 0, 1, 1], [5, 2, 0, 1], [1, 5, 2]]
    assert np.array_equal(np.concatenate(labels), store.all_labels())
    assert store.all_labels().dtype == labels[0].dtype == np.int64
    assert ShardFolder(tmp_path, MANIFEST).labels(0) is None


@pytest.mark.parametrize("samples", ["0-3", "7,3,9-12", f"0-99,{LIMIT - 1}"])
def test_labels_of_pngs_are_in_dataset_json(tmp_path, samples):
    store, _ = written(tmp_path, format="png", samples=samples, class_labels="2,0,1")
    labels = json.loads((tmp_path / "dataset.json").read_text())
    want = [[f"{index:0{store.digits}d}.png", (2, 0, 1)[i % 3]] for i, index in enumerate(store.samples)]
    assert labels == {"labels": want}
    assert {name for name, _ in want} == set(names(tmp_path, ".png"))


@pytest.mark.parametrize("form", ["npz", "webdataset"])
def test_other_formats_have_no_dataset_json(tmp_path, form):
    written(tmp_path, format=form, class_labels="1")
    assert not (tmp_path / "dataset.json").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip_first(path):
    flip(path, 0)


def flip_last(path):
    flip(path, -1)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\n")


def garble(path):
    path.write_bytes(b"\xff\xfe\0")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("which", ["first file", "last file", "record"])
@pytest.mark.parametrize("damage", [cut, empty, flip_first, flip_last, lengthen, garble, Path.unlink])
def test_shard_is_done_only_if_its_checksum_holds(tmp_path, form, which, damage):
    store, samples = written(tmp_path, format=form)
    files = [f"0000{i}.png" for i in range(4, 8)] if form == "png" else [f"00001{FORMATS[form]}"]
    path = tmp_path / {"first file": files[0], "last file": files[-1], "record": ".shards/00001"}[which]
    damage(path)
    assert [store.is_done(k) for k in range(3)] == [True, False, True]
    what = "is not written yet" if (damage, which) == (Path.unlink, "record") else "is damaged"
    message = error_line(store.read, 1)
    assert message == f"shard 1 of 3 in {tmp_path} {what}; run the command that wrote the others again"
    assert error_line(list, store.arrays()) == message
    assert np.array_equal(store.read(2), samples[8:])
    store.write(1, samples[4:8])
    assert np.array_equal(np.concatenate(list(store.arrays())), samples)


def test_shard_of_another_manifest_is_not_done(tmp_path):
    """A process that another job left behind may write into a folder that was emptied since."""
    one, _ = written(tmp_path / "one")
    other, _ = written(tmp_path / "other", seed=1)
    for name in ("00000.npz", ".shards/00000"):
        (other.path / name).write_bytes((one.path / name).read_bytes())
    assert [other.is_done(k) for k in range(3)] == [False, True, True]
    reordered = ShardFolder(one.path, dict(reversed(MANIFEST.items())))  # JSON objects have no order
    assert all(map(reordered.is_done, range(3)))


def test_checksum_is_written_last(tmp_path, monkeypatch):
    """After all files of the shard have their names; otherwise a crash could leave a checksum without files."""
    order = []
    monkeypatch.setattr("fastddpm.storage.shards.write_together", lambda contents: order.append(len(list(contents))))
    monkeypatch.setattr("fastddpm.storage.shards.atomic", lambda path: order.append(path) or nullcontext(io.BytesIO()))
    ShardFolder(tmp_path, {**MANIFEST, "format": "png"}).write(0, drawn(4, (3, 2, 1)))
    assert order == [4, tmp_path / ".shards" / "00000"]


@pytest.mark.parametrize("n", [3, 5])
def test_wrong_number_of_samples_is_refused(tmp_path, n):
    store = ShardFolder(tmp_path, {**MANIFEST, "format": "png"})
    store.begin()
    with pytest.raises(ValueError, match="zip"):
        store.write(0, drawn(n, (3, 2, 1)))
    assert names(tmp_path, "") == [".shards", "manifest.json"]
    assert not store.is_done(0)


def test_written_counts_samples(tmp_path):
    store = ShardFolder(tmp_path / "out", MANIFEST)
    assert store.written() == 0  # also without a folder
    store.begin()
    assert store.written() == 0
    store.write(2, drawn(3, (3, 2, 1)))
    assert store.written() == 3
    store.write(0, drawn(4, (3, 2, 1)))
    (tmp_path / "out" / ".shards" / ".00001.7.tmp").touch()
    assert store.written() == 7


def test_begin_deletes_leftovers(tmp_path):
    store, _ = written(tmp_path)
    want = contents(tmp_path)
    ours = [files._resolved(path)[1] for path in (tmp_path / "00000.npz", tmp_path / ".shards" / "00001")]
    left = [*ours, tmp_path / ".00002.npz.77.tmp", tmp_path / ".manifest.json.123-00ff.tmp"]
    theirs = {"notes.tmp": b"", ".hidden": b"", "x.7.tmp": b"", ".shards/notes": b"mine"}
    for path in left:
        path.write_bytes(b"half")
    for name, content in theirs.items():
        (tmp_path / name).write_bytes(content)
    store.begin()
    assert contents(tmp_path) == want | theirs


def test_begin_again_changes_nothing(tmp_path):
    for form in FORMATS:
        folder = tmp_path / "deep" / form
        store, _ = written(folder, format=form, class_labels="1,0")
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        before = [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in paths]
        ShardFolder(folder, store.manifest).begin()
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        assert [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in paths] == before
        assert json.loads((folder / "manifest.json").read_text()) == store.manifest


def test_begin_writes_missing_labels(tmp_path):
    store, _ = written(tmp_path, format="png", class_labels="1,0")
    want = contents(tmp_path)
    (tmp_path / "dataset.json").unlink()
    store.begin()
    assert contents(tmp_path) == want


@pytest.mark.parametrize("form", FORMATS)
def test_foreign_files_are_refused(tmp_path, form):
    """Files that look like shards or labels; other files may stay."""
    store = ShardFolder(tmp_path, {**MANIFEST, "format": form, "class_labels": "1"})
    (tmp_path / "notes.txt").write_text("mine")
    for name in (f"holiday{FORMATS[form]}", "dataset.json"):
        (tmp_path / name).write_text("mine")
        before = contents(tmp_path)
        want = f"{tmp_path} holds {name} but no manifest.json; name another folder"
        assert error_line(store.begin) == want
        assert contents(tmp_path) == before
        (tmp_path / name).unlink()
    store.begin()
    assert (tmp_path / "notes.txt").read_text() == "mine"


MODEL = {"class": "UNet2D", "config": {"layers": 1, "norm": "group", "more": {"deep": [1, 2]}}, "sha256": "ab"}


@pytest.mark.parametrize(
    ("change", "there", "here"),
    [
        ({"seed": 7}, '"seed": 0', '"seed": 7'),
        ({"samples": "0-11"}, '"samples": "0-10"', '"samples": "0-11"'),
        ({"model": {**MODEL, "sha256": "cd"}}, '"model": {"sha256": "ab"}', '"model": {"sha256": "cd"}'),
        (
            {"model": {**MODEL, "config": {**MODEL["config"], "more": {"deep": [1, 3]}}}, "shard_size": 5},
            '"shard_size": 4, "model": {"config": {"more": {"deep": [1, 2]}}}',
            '"shard_size": 5, "model": {"config": {"more": {"deep": [1, 3]}}}',
        ),
        ({"model": None}, f'"model": {json.dumps(MODEL)}', '"model": null'),
        ({"eta": 0.5}, '"eta": null', '"eta": 0.5'),
        ({"class_labels": "1,2"}, '"class_labels": null', '"class_labels": "1,2"'),
    ],
)
def test_other_samples_are_refused(tmp_path, change, there, here):
    """The message names the fields that differ, with both values; the folder does not change."""
    manifest = {**MANIFEST, "model": MODEL}
    written(tmp_path, **manifest)
    (tmp_path / ".00001.npz.77.tmp").touch()  # of a job that may be running
    before = contents(tmp_path)
    message = error_line(ShardFolder(tmp_path, {**manifest, **change}).begin)
    assert message == f"{tmp_path} holds samples with {there}, not {here}; name another folder"
    assert contents(tmp_path) == before


def test_long_differences_are_shortened():
    assert in_short({"a": 1, "b": "x"}) == '"a": 1, "b": "x"'
    assert in_short({"a": "x" * 193}) == f'"a": "{"x" * 193}"'  # 200 characters
    assert in_short({"a": "x" * 194}) == f'"a": "{"x" * 194} ...'


@pytest.mark.parametrize(
    "text",
    [b"", b"[", b"[]", b"null", b"3", b'"abc"', b"{}", b"\xff\xfe", b"[" * 100_000]
    + [
        json.dumps({**MANIFEST, **change}).encode()
        for change in (
            {"format": "jpg"},
            {"format": 3},
            {"samples": ""},
            {"samples": 5},
            {"samples": "5-3"},
            {"samples": str(LIMIT)},
            {"shard_size": 0},
            {"shard_size": -4},
            {"shard_size": 2.5},
            {"shard_size": "4"},
            {"shard_size": True},
            {"shard_size": None},
            {"class_labels": 3},
            {"class_labels": ""},
            {"class_labels": "a"},
        )
    ]
    + [json.dumps({**MANIFEST, "samples": "0-10"}).encode()[:-3]]
    + [json.dumps({n: v for n, v in MANIFEST.items() if n != name}).encode() for name in list(MANIFEST)[:4]],
    ids=lambda text: text[:60].decode("latin1"),
)
def test_damaged_manifest_is_refused(tmp_path, text):
    """The folder does not change."""
    path = tmp_path / "manifest.json"
    path.write_bytes(text)
    for message in (error_line(ShardFolder.open, tmp_path), error_line(ShardFolder(tmp_path, MANIFEST).begin)):
        assert message.startswith(f"{path} is damaged (")
        assert message.endswith("); sample into another folder")
        assert len(message) < len(str(path)) + 300
    assert contents(tmp_path) == {"manifest.json": text}
    assert is_shard_folder(tmp_path)


def test_folder_without_a_manifest_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert (
            error_line(ShardFolder.open, path)
            == f"{path} has no manifest.json; want a folder that `fastddpm sample` wrote"
        )
        assert not is_shard_folder(path)
    (tmp_path / "manifest.json").mkdir()
    assert not is_shard_folder(tmp_path)
    assert "is damaged" in error_line(ShardFolder.open, tmp_path)
