"""Shards: read as written, the same bytes each time, complete or missing, and never mixed with other samples."""

import functools
import io
import json
import os
import tarfile
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm.storage.audio import read_wav, wav_bytes
from fastddpm.storage.indices import LIMIT, Indices
from fastddpm.storage.merge import merge
from fastddpm.storage.shards import FORMATS, ShardFolder, continued, in_short, is_shard_folder
from tests.support.check import error_line
from tests.support.jobs import contents

MANIFEST = {"format": "npz", "samples": "0-10", "shard_size": 4, "class_labels": None, "seed": 0, "shape": [1, 3, 2]}
REQUIRED = ("format", "samples", "shard_size", "class_labels", "shape")
PICTURE_FORMATS = [form for form in FORMATS if form != "wav"]
PICTURES = [(3, 2, 1), (2, 3, 3), (2, 2, 4)]
FLOATS = [(2, 5), (3,), (5, 2, 2), (1, 4, 4)]
SHAPES = [
    (form, shape) for form in PICTURE_FORMATS for shape in [*PICTURES, *FLOATS] if form != "png" or shape in PICTURES
]


def drawn(n, shape, seed=0):
    """What a job writes: uint8 images, or floats of another shape."""
    random = np.random.default_rng(seed)
    if shape in PICTURES:
        return random.integers(0, 256, (n, *shape), np.uint8)
    return random.standard_normal((n, *shape), np.float32)


def written(folder, shape=(3, 2, 1), /, **manifest):
    """(a finished folder, the samples in it)."""
    *rest, last = shape
    described = {"shape": [last, *rest]} if shape in PICTURES else {"shape": list(shape), "latents": True}
    store = ShardFolder(folder, {**MANIFEST, **described, **manifest})
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
@pytest.mark.parametrize("form", PICTURE_FORMATS)
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


@pytest.mark.parametrize("form", PICTURE_FORMATS)
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


def test_begin_leaves_all_other_files(tmp_path):
    """Those of the user, and temporary files, which the next writer of the same file deletes."""
    store, _ = written(tmp_path)
    want = contents(tmp_path)
    theirs = {"notes.tmp": b"", ".hidden": b"", ".00001.npz.7.tmp": b"", ".shards/notes": b"mine"}
    theirs |= {".00001.npz.0.fastddpm-tmp": b"half"}
    for name, content in theirs.items():
        (tmp_path / name).write_bytes(content)
    store.begin()
    assert contents(tmp_path) == want | theirs
    store.write(1, store.read(1))
    del theirs[".00001.npz.0.fastddpm-tmp"]
    assert contents(tmp_path) == want | theirs


def test_begin_again_changes_nothing(tmp_path):
    for form in PICTURE_FORMATS:
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


@pytest.mark.parametrize("form", PICTURE_FORMATS)
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
        ({"samples": "0-9"}, '"samples": "0-10"', '"samples": "0-9"'),
        ({"model": {**MODEL, "sha256": "cd"}}, '"model": {"sha256": "ab"}', '"model": {"sha256": "cd"}'),
        (
            {"model": {**MODEL, "config": {**MODEL["config"], "more": {"deep": [1, 3]}}}, "shard_size": 5},
            '"shard_size": 4, "model": {"config": {"more": {"deep": [1, 2]}}}',
            '"shard_size": 5, "model": {"config": {"more": {"deep": [1, 3]}}}',
        ),
        ({"model": {}}, f'"model": {json.dumps(MODEL)}', '"model": {"class": null, "config": null, "sha256": null}'),
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
            {"class_labels": f"0-{LIMIT - 1}," * 9},
            {"samples": f"0-{LIMIT - 1}"},
            {"samples": "\ud800"},
            {"shard_size": 10**23},
            {"shard_size": 10**400},
            {"grown_from": 4},
            {"grown_from": ["4"]},
            {"grown_from": [0]},
            {"grown_from": [4, 4]},
            {"grown_from": [11]},
            {"grown_from": [12]},
            {"grown_from": [-1]},
            {"shape": "1x3x2"},
            {"shape": [1, 0]},
            {"shape": [1, 10**23]},
            {"latents": "false"},
            {"seed": [0]},
            {"seed": "0"},
            {"seed": -1},
            {"seed": 1 << 64},
            {"seed": True},
            {"precision": ["fp32"]},
            {"precision": "fp99"},
            {"batch_size": 1 << 63},
            {"batch_size": "3"},
            {"batch_invariant": -1},
            {"batch_invariant": True},
            {"compiled": 1},
            {"sampler": "ddpm"},
            {"schedule": [1]},
            {"model": None},
            {"model": functools.reduce(lambda inner, _: {"a": inner}, range(100), 1)},
            {"versions": 3},
        )
    ]
    + [json.dumps({**MANIFEST, "samples": "0-10"}).encode()[:-3]]
    + [json.dumps({n: v for n, v in MANIFEST.items() if n != name}).encode() for name in REQUIRED],
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


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (json.dumps({"format": "npz", "samples": "0-3"}), "it lacks shard_size, class_labels, shape"),
        (json.dumps({**MANIFEST, "samples": 5}), "its samples is 5; want text such as 0-7,12"),
        (json.dumps({**MANIFEST, "class_labels": [1]}), "its class_labels is [1]; want text such as 0-7,12"),
        ("[]", "it is []; want an object"),
        ("null", "it is None; want an object"),
        ('"ab"', "it is 'ab'; want an object"),
        ("9" * 5000, "it is not valid JSON"),
        ("[" * 100_000, "it is not valid JSON"),
        ("{", "it is not valid JSON"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_wrong_with_a_manifest_is_said_in_our_words(tmp_path, text, why):
    (tmp_path / "manifest.json").write_text(text)
    wanted = f"{tmp_path / 'manifest.json'} is damaged ({why}); sample into another folder"
    assert error_line(ShardFolder.open, tmp_path) == wanted


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


def test_pipes_in_a_folder_are_refused(tmp_path):
    """As a manifest, a shard or its record: reading one would wait for ever."""
    store, samples = written(tmp_path / "out")
    for name in ("00001.npz", ".shards/00001"):
        path = tmp_path / "out" / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        for call in (lambda: store.is_done(1), lambda: store.read(1)):
            assert error_line(call) == f"{path} is a pipe or a device; want a file"
        if name == "00001.npz":
            assert "is a pipe or a device" in error_line(store.write, 1, samples[4:8])
        path.unlink()
        path.write_bytes(content)
    (tmp_path / "out" / "manifest.json").unlink()
    os.mkfifo(tmp_path / "out" / "manifest.json")
    for call in (lambda: ShardFolder.open(tmp_path / "out"), store.begin):
        assert "manifest.json is a pipe or a device; want a file" in error_line(call)


def rewritten(store, k, *contents):
    """Replace the files of a shard, with a checksum that holds."""
    for path, content in zip(store._files(k), contents, strict=True):
        path.write_bytes(content)
    store._record(k).write_text(store._checksum(k, contents))


def npz(*arrays, save=np.savez, **named):
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def tar(*arrays):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for i, array in enumerate(arrays):
            content = npz(array, save=np.save)
            member = tarfile.TarInfo(f"{i}.npy")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def png(array, mode="L"):
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, format="PNG")
    return buffer.getvalue()


SHAPE = {"shape": [1, 3, 2]}  # of a sample, channels first
ONE = np.zeros((3, 2), np.uint8)
OTHERS = {
    "npz": [
        [npz(np.zeros((4, 2, 3, 1), np.uint8))],
        [npz(np.zeros((3, 3, 2, 1), np.uint8))],
        [npz(np.zeros((4, 3, 2, 1), np.int8))],
        [npz(np.zeros((4, 3, 2, 1), np.float32))],
        [npz(np.zeros((4, 3, 2), np.uint8))],
        [npz(np.array([{}] * 4, object))],
        [npz(np.zeros(1 << 22, np.uint8), save=np.savez_compressed)],
        [npz(other=np.zeros((4, 3, 2, 1), np.uint8))],
        [npz(np.zeros((4, 3, 2, 1), np.uint8), save=np.save)],
        [b"no zip"],
        [b""],
    ],
    "webdataset": [
        [tar(*4 * [np.zeros((3, 2, 1), np.float32)])],
        [tar(*3 * [np.zeros((3, 2, 1), np.uint8)])],
        [tar(*3 * [np.zeros((3, 2, 1), np.uint8)], np.zeros((3, 2, 1), np.int16))],
        [tar()],
        [b"no tar" * 1000],
    ],
    "png": [
        [png(ONE.T)] * 4,
        [png(ONE)] * 3 + [png(ONE.T)],
        [png(ONE, "RGB")] * 4,
        [png(ONE, "P")] * 4,
        [png(ONE, "1")] * 4,
        [png(ONE)] * 3 + [b"no png"],
    ],
}


@pytest.mark.parametrize(("form", "number"), [(form, i) for form, cases in OTHERS.items() for i in range(len(cases))])
def test_shard_of_other_contents_is_refused(tmp_path, form, number):
    """Its checksum holds, but it does not hold what the manifest says; the message names the file."""
    store, samples = written(tmp_path, format=form, **SHAPE)
    rewritten(store, 1, *OTHERS[form][number])
    assert store.is_done(1)
    file = tmp_path / ("00004.png" if form == "png" else f"00001{FORMATS[form]}")
    want = f"{file} does not hold 4 samples of (3, 2, 1) uint8, as manifest.json says; delete it and run the command"
    assert error_line(store.read, 1) == f"{want} that wrote it again"
    assert np.array_equal(store.read(2), samples[8:])


def test_latents_are_floats(tmp_path):
    """Also those whose shape could be that of an image."""
    for latents, kind in ((True, np.float32), (False, np.uint8)):
        store = ShardFolder(tmp_path / str(latents), {**MANIFEST, "shape": [3, 2, 2], "latents": latents})
        store.begin()
        good = np.zeros((4, 3, 2, 2), kind) if latents else np.zeros((4, 2, 2, 3), kind)
        store.write(0, good)
        assert np.array_equal(store.read(0), good)
        store.write(1, np.zeros((4, 2, 2, 3) if latents else (4, 3, 2, 2), kind))
        assert "does not hold 4 samples" in error_line(store.read, 1)


GROWTH = [("0-6", "0-10"), ("0-7", "0-10"), ("0-3", "0-8"), ("5,7,1-2", "5,7,1-3,0"), ("9", "9-20")]


@pytest.mark.parametrize(("first", "then"), GROWTH)
@pytest.mark.parametrize("form", PICTURE_FORMATS)
def test_folder_grows(tmp_path, form, first, then):
    """Finished shards stay as they are; the further samples and labels are those of a folder of all."""
    asked = {**MANIFEST, "format": form, "class_labels": "2,0-1,1,5", "shape": [1, 3, 2]}
    whole = ShardFolder(tmp_path / "whole", {**asked, "samples": then})
    samples = drawn(len(whole.samples), (3, 2, 1))
    small = ShardFolder(tmp_path / "out", {**asked, "samples": first})
    n = len(small.samples)
    small = ShardFolder(small.path, {**small.manifest, "class_labels": str(small.classes[:n])})  # one each at most
    small.begin()
    for k in range(len(small)):
        small.write(k, samples[:n][k * 4 : k * 4 + 4])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("0*")}
    grown = ShardFolder(tmp_path / "out", continued(small.manifest, whole.manifest))
    assert grown.manifest == {**whole.manifest, "grown_from": [n]}
    grown.begin()
    assert [grown.is_done(k) for k in range(len(grown))] == [True] * len(small) + [False] * (len(grown) - len(small))
    assert grown.written() == n
    for k in range(len(small), len(grown)):
        assert grown.count(k) <= 4
        at = n + 4 * (k - len(small))
        grown.write(k, samples[at : at + 4])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = ShardFolder.open(tmp_path / "out")
    assert np.array_equal(np.concatenate(list(again.arrays())), samples)
    assert [i for k in range(len(again)) for i in again.indices(k)] == list(whole.samples)
    assert np.array_equal(np.concatenate([again.labels(k) for k in range(len(again))]), whole.all_labels())
    assert np.array_equal(again.all_labels(), whole.all_labels())
    again.check_complete()
    assert continued(again.manifest, whole.manifest) == again.manifest  # the same command again
    if form == "png":
        whole.begin()
        assert (tmp_path / "out" / "dataset.json").read_bytes() == (tmp_path / "whole" / "dataset.json").read_bytes()
    more = continued(again.manifest, {**whole.manifest, "samples": f"{then},30"})
    assert more["grown_from"] == [n, len(whole.samples)]
    ShardFolder(tmp_path / "out", more).begin()
    assert all(ShardFolder.open(tmp_path / "out").is_done(k) for k in range(len(grown)))
    with pytest.raises(ValueError, match="holds samples with ") as error:
        ShardFolder(tmp_path / "out", {**whole.manifest, "seed": 1}).begin()
    assert "grown_from" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"samples": "1-20"}, {"samples": "0-5"}, {"seed": 1}, {"shard_size": 5}, {"eta": 1}]
)
def test_other_samples_do_not_grow_a_folder(change):
    asked = {**MANIFEST, "samples": "0-20", **change}
    assert continued(MANIFEST, asked) == asked
    assert continued({}, asked) == asked


@pytest.mark.parametrize(("first", "then"), [("0-3", "0-9"), ("5,5,5,1", "5,5,5,1,0-6")])
def test_folder_grows_with_labels_for_further_samples(tmp_path, first, then):
    """Where the first samples keep theirs."""
    store, _ = written(tmp_path, format="png", samples="0-3", class_labels=first)
    wanted = {**store.manifest, "samples": "0-10", "class_labels": then}
    grown = ShardFolder(tmp_path, continued(store.manifest, wanted))
    grown.begin()
    assert grown.is_done(0)
    want = [*Indices.parse(then), *Indices.parse(then)][:11]
    assert grown.all_labels().tolist() == want
    assert [label for _, label in json.loads((tmp_path / "dataset.json").read_text())["labels"]] == want
    assert continued(grown.manifest, wanted) == grown.manifest


def test_folder_that_cannot_grow_names_the_command(tmp_path):
    """File names would have other widths, finished samples other labels, or shards another size."""
    for name, before, now, others in (
        ("digits", {"samples": "0-10"}, {"samples": "0-10,100000"}, "100000"),
        ("labels", {"class_labels": "1-2"}, {"class_labels": "1-2,0", "samples": "0-15"}, "11-15"),
        ("size", {"batch_size": 4}, {"shard_size": 5, "batch_size": 5, "samples": "0-15"}, "11-15"),
    ):
        store, _ = written(tmp_path / name, **before)
        state = contents(tmp_path / name)
        asked = {**store.manifest, **now}
        message = error_line(ShardFolder(tmp_path / name, continued(store.manifest, asked)).begin)
        way_out = f"draw the others with --indices {others} into another folder, and join both with `fastddpm merge`"
        assert message.endswith(f"; {way_out}")
        assert contents(tmp_path / name) == state


@pytest.mark.parametrize("form", PICTURE_FORMATS)
def test_growth_survives_a_kill_at_each_write(tmp_path, form, monkeypatch):
    """The next begin finds the finished shards and completes the labels, whether it asks for further samples or not."""

    class Killed(Exception):
        pass

    asked = {**MANIFEST, "format": form, "class_labels": "1,0"}
    replace = os.replace
    for asks_again in ("0-10", "0-20"):
        for kill in range(3):
            folder = tmp_path / f"{asks_again}-{kill}"
            store, _ = written(folder, **asked)
            left = [kill]

            def dying(*names, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                replace(*names)

            grown = ShardFolder(folder, continued(store.manifest, {**store.manifest, "samples": "0-20"}))
            with monkeypatch.context() as patched:
                patched.setattr(os, "replace", dying)
                with suppress(Killed):
                    grown.begin()
            held = ShardFolder.open(folder).manifest
            assert held in (store.manifest, grown.manifest)
            wanted = {**store.manifest, "samples": asks_again}
            again = ShardFolder(folder, continued(held, wanted))
            if held == grown.manifest and asks_again == "0-10":
                assert "name another folder" in error_line(again.begin)
                continue
            again.begin()
            assert [again.is_done(k) for k in range(len(again))] == [True] * 3 + [False] * (len(again) - 3)
            if form == "png":
                labelled = json.loads((folder / "dataset.json").read_text())["labels"]
                assert len(labelled) == len(again.samples)


@pytest.mark.parametrize("name", ["manifest.json", "00001.npz", ".shards/00002", "."])
def test_files_deleted_meanwhile_are_noticed(tmp_path, name):
    """A manifest is written again, so that the same command can go on."""
    store, _ = written(tmp_path / "out")
    store.check_complete()
    before = contents(tmp_path / "out")
    if name == ".":
        (tmp_path / "out").rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "out" / name).unlink()
    want = f"files of {tmp_path / 'out'} were deleted while the job ran; give the same command again, which draws"
    assert error_line(store.check_complete) == f"{want} what is missing"
    if name == "manifest.json":
        assert contents(tmp_path / "out") == before
        store.begin()
        store.check_complete()


def test_labels_deleted_meanwhile_are_noticed(tmp_path):
    """They are written again, as a manifest is."""
    store, _ = written(tmp_path, (3, 2, 1), format="png", class_labels="2,0,1")
    before = contents(tmp_path)
    (tmp_path / "dataset.json").unlink()
    assert "were deleted while the job ran" in error_line(store.check_complete)
    assert contents(tmp_path) == before
    store.check_complete()


def test_manifest_changed_meanwhile_is_noticed(tmp_path):
    store, _ = written(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, "seed": 3}))
    assert (
        error_line(store.check_complete)
        == f"{tmp_path}/manifest.json was changed while the job ran; name another folder"
    )


def test_owned_names():
    store = ShardFolder("out", MANIFEST)
    for name in ("manifest.json", "dataset.json", "00001.npz", "mine.npz", ".shards", ".shards/00000"):
        assert store.owns(name)
    for name in ("log.jsonl", "logs/manifest.json", "mine.png", "my-manifest.json"):
        assert not store.owns(name)


def test_labels_are_not_listed(tmp_path):
    """A million million class labels take no memory."""
    many = 10**12
    store = ShardFolder(
        tmp_path, {**MANIFEST, "samples": f"0-{many - 1}", "shard_size": 10**6, "class_labels": f"7-{many}"}
    )
    assert store.labels(0)[:3].tolist() == [7, 8, 9]
    assert store.labels(len(store) - 1)[-7:].tolist() == [many, 7, 8, 9, 10, 11, 12]


def test_too_many_shards_are_refused():
    message = error_line(ShardFolder, "out", {**MANIFEST, "samples": f"0-{10**12 - 1}"})
    assert message == (
        "1000000000000 samples in shards of 4 are 250000000000 shards; want at most 16777216: "
        "use a larger shard_size, or fewer samples"
    )
    message = error_line(ShardFolder, "out", {**MANIFEST, "samples": f"0-{10**12}", "shard_size": 10**12})
    assert message == "its shard_size is 1000000000000; want at most 268435456 samples in a shard"


def test_records_of_other_shards_are_not_counted(tmp_path):
    store, _ = written(tmp_path)
    for name in ("00003", "99999", "\N{ARABIC-INDIC DIGIT NINE}" * 3):
        (tmp_path / ".shards" / name).touch()
    assert store.written() == 11


# Waveforms


WAVES = {"format": "wav", "sample_rate": 8000, "shape": [1, 64]}


@pytest.mark.parametrize("labels", [None, "2,0,1"])
def test_waveforms_are_files_of_16_bits(tmp_path, labels):
    random = np.random.default_rng(0)
    samples = random.uniform(-1.2, 1.2, (11, 1, 64)).astype(np.float32)
    store = ShardFolder(tmp_path, {**MANIFEST, **WAVES, "class_labels": labels})
    store.begin()
    for k in range(3):
        store.write(k, samples[4 * k : 4 * k + 4])
    store.check_complete()
    assert names(tmp_path, ".wav") == [f"{i:05d}.wav" for i in range(11)]
    stored = [read_wav(tmp_path / f"{i:05d}.wav", sample_rate=8000)[0] for i in range(11)]
    assert np.abs(np.stack(stored) - samples[:, 0].clip(-1, 1)).max() <= 2**-15
    again = ShardFolder.open(tmp_path)
    assert np.array_equal(np.concatenate(list(again.arrays()))[:, 0], np.stack(stored))
    if labels is not None:
        assert json.loads((tmp_path / "dataset.json").read_text())["labels"][1] == ["00001.wav", 0]
    merge([tmp_path], tmp_path.parent / "all.npz", progress=False)
    with np.load(tmp_path.parent / "all.npz") as arrays:
        assert np.array_equal(arrays["arr_0"][:, 0], np.stack(stored))


@pytest.mark.parametrize(
    "content",
    [
        wav_bytes(np.zeros(63, np.float32), 8000),
        wav_bytes(np.zeros(64, np.float32), 8000)[:-10],
        b"RIFF",
    ],
)
def test_a_damaged_waveform_is_drawn_again(tmp_path, content):
    store = ShardFolder(tmp_path, {**MANIFEST, **WAVES, "samples": "0", "shard_size": 1})
    store.begin()
    store.write(0, np.zeros((1, 1, 64), np.float32))
    assert store.is_done(0)
    (tmp_path / "00000.wav").write_bytes(content)
    assert not store.is_done(0)


def test_the_sample_rate_is_checked(tmp_path):
    assert "its sample_rate is 0" in error_line(ShardFolder, tmp_path, {**MANIFEST, **WAVES, "sample_rate": 0})
