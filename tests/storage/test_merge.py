"""Folders of samples merged into one file: numpy's own bytes or a tar, complete or unchanged, one shard in memory."""

import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from fastddpm.storage import images
from fastddpm.storage.merge import merge
from fastddpm.storage.shards import ShardFolder
from tests.storage.test_shards import PICTURE_FORMATS
from tests.support.check import error_line
from tests.support.jobs import contents

MANIFEST = {"format": "npz", "samples": "0-10", "shard_size": 4, "class_labels": None, "seed": 0, "shape": [1, 3, 2]}


def written(folder, shape=(3, 2, 1), /, **manifest):
    """The samples in a finished folder: images if the shape has three sizes, else floats."""
    pictures = len(shape) == 3
    channels_first = [shape[2], *shape[:2]] if pictures else list(shape)
    store = ShardFolder(folder, {**MANIFEST, "shape": channels_first, **manifest})
    store.begin()
    random = np.random.default_rng(len(str(folder)))
    n = len(store.samples)
    samples = random.integers(0, 256, (n, *shape), np.uint8) if pictures else random.random((n, *shape), np.float32)
    for k in range(len(store)):
        store.write(k, samples[k * store.shard_size : (k + 1) * store.shard_size])
    return samples


def merged(out, *folders):
    return merge(folders, out, progress=False)


@pytest.mark.parametrize("shape", [(3, 2, 1), (2, 2, 3), (2, 5), (4,)])
@pytest.mark.parametrize("form", PICTURE_FORMATS)
@pytest.mark.parametrize("size", [1, 4, 11, 100])
def test_npz_has_the_bytes_of_save_npz(tmp_path, form, shape, size):
    if form == "png" and len(shape) < 3:
        form = "npz"
    samples = written(tmp_path / "in", shape, format=form, shard_size=size)
    assert merged(tmp_path / "deep" / "out.npz", tmp_path / "in") == samples.shape
    images.save_npz(samples, tmp_path / "want.npz")
    assert (tmp_path / "deep" / "out.npz").read_bytes() == (tmp_path / "want.npz").read_bytes()
    assert os.listdir(tmp_path / "deep") == ["out.npz"]


@pytest.mark.parametrize("form", PICTURE_FORMATS)
def test_labels_are_a_second_array(tmp_path, form):
    """They are repeated within each folder."""
    one = written(tmp_path / "one", format=form, class_labels="2,0,1")
    other = written(tmp_path / "other", samples="20-22", class_labels="7")
    merged(tmp_path / "out.npz", tmp_path / "one", tmp_path / "other")
    labels = [2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 7, 7, 7]
    np.savez(tmp_path / "want.npz", np.concatenate([one, other]), np.array(labels))
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "want.npz").read_bytes()


@pytest.mark.parametrize("order", [("npz", "png", "webdataset"), ("webdataset", "npz", "png")])
def test_folders_are_joined_in_the_order_given(tmp_path, order):
    """Whatever their format, shard size and seed; samples of two seeds may have the same index."""
    parts = {
        "npz": written(tmp_path / "npz", format="npz", samples="30-34", shard_size=2),
        "png": written(tmp_path / "png", format="png", samples="9,0-3", shard_size=3, versions={"torch": "1"}),
        "webdataset": written(tmp_path / "webdataset", format="webdataset", samples="30-31", seed=1),
    }
    assert merged(tmp_path / "out.npz", *(tmp_path / form for form in order)) == (12, 3, 2, 1)
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays.files == ["arr_0"]
        assert np.array_equal(arrays["arr_0"], np.concatenate([parts[form] for form in order]))


@pytest.mark.parametrize("shape", [(3, 2, 1), (2, 2, 4), (2, 5)])
@pytest.mark.parametrize("suffix", [".tar", ".TAR"])
def test_tar_is_one_large_shard(tmp_path, shape, suffix):
    """Names have one width and no time; the bytes are those of a folder with a single shard."""
    one = written(tmp_path / "one", shape, class_labels="2,0")
    form = "webdataset" if len(shape) < 3 else "png"
    other = written(tmp_path / "other", shape, format=form, samples="123456,20", class_labels="7")
    merged(tmp_path / f"out{suffix}", tmp_path / "one", tmp_path / "other")
    end = "png" if len(shape) == 3 else "npy"
    indices = [*range(11), 123456, 20]
    with tarfile.open(tmp_path / f"out{suffix}") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [f"{i:06d}.{kind}" for i in indices for kind in (end, "cls")]
        assert {member.mtime for member in members} == {0}
        for data, label, want, number in zip(
            members[::2], members[1::2], [*one, *other], [2, 0] * 5 + [2, 7, 7], strict=True
        ):
            content = io.BytesIO(tar.extractfile(data).read())
            got = np.load(content) if end == "npy" else np.asarray(Image.open(content)).reshape(shape)
            assert np.array_equal(got, want)
            assert tar.extractfile(label).read() == b"%d" % number
    written(tmp_path / "whole", shape, format="webdataset", shard_size=11)
    written(tmp_path / "parts", shape, samples="0-10", format="webdataset", shard_size=2)
    merged(tmp_path / "again.tar", tmp_path / "parts")
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "whole" / "00000.tar").read_bytes()


def test_tar_without_labels(tmp_path):
    written(tmp_path / "in", samples="5,3")
    merged(tmp_path / "out.tar", tmp_path / "in")
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert tar.getnames() == ["00005.png", "00003.png"]


@pytest.fixture
def kept(tmp_path):
    """A folder with an out.npz and an out.tar, which must not change."""
    for suffix in (".npz", ".tar"):
        (tmp_path / f"out{suffix}").write_bytes(b"before")
    yield tmp_path
    for suffix in (".npz", ".tar"):
        assert (tmp_path / f"out{suffix}").read_bytes() == b"before"
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")] == []


@pytest.mark.parametrize("suffix", [".npz", ".tar"])
@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("damage", ["unfinished", "damaged"])
def test_unfinished_folder_is_refused_and_changes_nothing(kept, suffix, k, damage):
    written(kept / "one")
    written(kept / "other", samples="20-30")
    name = f"0000{k}.npz" if damage == "damaged" else f".shards/0000{k}"
    (kept / "other" / name).unlink()
    before = contents(kept / "one"), contents(kept / "other")
    message = error_line(merged, kept / f"out{suffix}", kept / "one", kept / "other")
    what = "is damaged" if damage == "damaged" else "is not written yet"
    assert message == f"shard {k} of 3 in {kept / 'other'} {what}; run the command that wrote the others again"
    assert (contents(kept / "one"), contents(kept / "other")) == before


@pytest.mark.parametrize("name", ["model", "schedule", "sampler"])
def test_samples_of_another_distribution_are_refused(kept, name):
    """The message says what differs, and in which folders."""
    written(kept / "one", **{name: {"a": 1, "b": [2]}})
    written(kept / "two", **{name: {"a": 1, "b": [2]}}, samples="20")
    written(kept / "three", **{name: {"a": 1, "b": [3]}}, samples="30")
    message = error_line(merged, kept / "out.npz", kept / "one", kept / "two", kept / "three")
    there, here = (f'"{name}": {{"b": [{b}]}}' for b in (3, 2))
    want = f"{kept / 'three'} holds samples with {there}, but {kept / 'one'} with {here}"
    assert message == f"{want}; merge samples of one distribution"


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [("shape", [1, 3, 2], [1, 2, 3]), ("shape", [6], [2, 3]), ("precision", "bf16", "fp32"), ("latents", True, None)],
)
def test_samples_of_another_form_are_refused(kept, name, one, other):
    written(kept / "one", **{name: one})
    written(kept / "two", samples="20", **({} if other is None else {name: other}))
    message = error_line(merged, kept / "out.npz", kept / "one", kept / "two")
    there, here = (f'"{name}": {json.dumps(value)}' for value in (other, one))
    want = f"{kept / 'two'} holds samples with {there}, but {kept / 'one'} with {here}"
    assert message == f"{want}; merge samples of one distribution"


@pytest.mark.parametrize("suffix", [".npz", ".tar"])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("change", [lambda x: x.view(np.int8), lambda x: x.swapaxes(1, 2), lambda x: x[:-1]])
def test_shard_that_is_not_as_the_manifest_says_is_refused(kept, suffix, k, change):
    """Though its checksum holds; the message names it."""
    samples = written(kept / "one")
    store = ShardFolder.open(kept / "one")
    store.write(k, change(samples[4 * k : 4 * k + 4]))
    message = error_line(merged, kept / f"out{suffix}", kept / "one")
    count = 4 if k == 0 else 3
    want = f"{kept}/one/0000{k}.npz does not hold {count} samples of (3, 2, 1) uint8, as manifest.json says"
    assert message == f"{want}; delete it and run the command that wrote it again"


@pytest.mark.parametrize("form", PICTURE_FORMATS)
def test_folder_that_has_grown_is_merged_in_order(tmp_path, form):
    one = written(tmp_path / "one", format=form, samples="0-5", class_labels="2,0,1")
    two = written(tmp_path / "two", format=form, samples="6-10", class_labels="2,0,1")
    store = ShardFolder.open(tmp_path / "one")
    store = ShardFolder(tmp_path / "one", {**store.manifest, "samples": "0-10", "grown_from": [6]})
    store.begin()
    assert "shard 2 of 4" in error_line(merged, tmp_path / "out.npz", tmp_path / "one")
    store.write(2, two[:4])
    store.write(3, two[4:])
    assert merged(tmp_path / "out.npz", tmp_path / "one") == (11, 3, 2, 1)
    with np.load(tmp_path / "out.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], np.concatenate([one, two]))
        assert arrays["arr_1"].tolist() == [2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_leftover_of_a_killed_merge_is_deleted(kept):
    written(kept / "one")
    for name in (".other.npz.0.fastddpm-tmp", ".other.npz.7.tmp"):
        (kept / name).write_bytes(b"half")
    merged(kept / "other.npz", kept / "one")
    assert not (kept / ".other.npz.0.fastddpm-tmp").exists()
    (kept / ".other.npz.7.tmp").unlink()  # the user's own


def test_other_types_are_refused(kept):
    written(kept / "one")
    assert error_line(merge, str(kept / "one"), kept / "out.npz") == f"folders are '{kept}/one'; want a list of paths"
    assert error_line(merge, 0, kept / "out.npz") == "folders are 0; want a list of paths"
    scalar = np.zeros((), np.int64)
    assert error_line(merge, scalar, kept / "out.npz") == "folders are array(0); want a list of paths"
    assert error_line(merge, [0], kept / "out.npz") == "the folder of samples is 0; want a path"
    assert error_line(merge, [kept / "one"], 0) == "out is 0; want a path"


def test_labelled_and_unlabelled_samples_are_refused(kept):
    written(kept / "one", class_labels="1")
    written(kept / "two", samples="20")
    message = error_line(merged, kept / "out.npz", kept / "one", kept / "two")
    assert '"labelled": false' in message
    assert '"labelled": true' in message


@pytest.mark.parametrize(
    ("suffix", "seed", "message"),
    [
        (".npz", 0, "sample 10 of seed 0 occurs twice; merge folders without common samples"),
        (".tar", 0, "index 10, by which a tar names samples, occurs twice; merge folders without common samples"),
        (".tar", 5, "index 10, by which a tar names samples, occurs twice; merge folders without common samples"),
    ],
)
def test_duplicate_samples_are_refused(kept, suffix, seed, message):
    written(kept / "one")
    written(kept / "two", samples="30,40", seed=seed)
    written(kept / "three", samples="20,10", seed=seed)
    assert error_line(merged, kept / f"out{suffix}", kept / "one", kept / "two", kept / "three") == message


def test_folder_merged_with_itself_is_refused(kept):
    written(kept / "one")
    assert "sample 0 of seed 0 occurs twice" in error_line(merged, kept / "out.npz", kept / "one", kept / "one")


def test_other_paths_are_refused(kept):
    written(kept / "one")
    assert "nothing to merge; name at least one folder" in error_line(merged, kept / "out.npz")
    assert "has no manifest.json" in error_line(merged, kept / "out.npz", kept / "one", kept)
    for name in ("out.zip", "out", "npz"):
        assert error_line(merged, kept / name, kept / "one") == f"out is {kept / name}; want an .npz or a .tar"
        assert not (kept / name).exists()
    (kept / "folder.npz").mkdir()
    assert "it is a folder" in error_line(merged, kept / "folder.npz", kept / "one")
    (kept / "link.npz").symlink_to("one/00000.npz")
    (kept / "two").symlink_to("one")
    before = contents(kept / "one")
    for inside in (kept / "one/x.npz", kept / "one/./x.tar", kept / "one/00000.npz", kept / "one/deep/x.npz"):
        message = error_line(merged, inside, kept / "one")
        assert message == f"out is {inside}, in {kept / 'one'} among its samples; name another place"
        assert contents(kept / "one") == before
    for inside in (kept / "link.npz", kept / "two" / "x.npz"):
        assert "among its samples; name another place" in error_line(merged, inside, kept / "one")
        assert contents(kept / "one") == before


def test_progress_is_shown_or_not(tmp_path, capsys):
    written(tmp_path / "in")
    merge([tmp_path / "in"], tmp_path / "out.npz")
    assert "3/3" in capsys.readouterr().err
    merged(tmp_path / "out.npz", tmp_path / "in")
    assert capsys.readouterr().err == ""
    (tmp_path / "in" / "00000.npz").unlink()
    error_line(merge, [tmp_path / "in"], tmp_path / "out.npz")
    assert capsys.readouterr().err == ""  # no bar before the error message


@pytest.mark.parametrize("suffix", [".npz", ".tar"])
def test_one_shard_is_in_memory_at_a_time(tmp_path, suffix):
    """Forty shards of a megabyte are merged in the memory of a few."""
    shard = 1 << 20
    store = ShardFolder(tmp_path / "in", {**MANIFEST, "samples": "0-159", "shape": [shard // 16]})
    store.begin()
    for k in range(40):
        store.write(k, np.random.default_rng(k).random((4, shard // 16), np.float32))
    merged(tmp_path / "warm.npz", tmp_path / "in")
    tracemalloc.start()
    try:
        merged(tmp_path / f"out{suffix}", tmp_path / "in")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / f"out{suffix}").stat().st_size > 40 * shard
    assert most < 8 * shard
