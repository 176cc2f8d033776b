"""Undisturbed jobs: the folder they write, what a restart draws, and which folders and arguments are refused."""

import functools
import io
import json
import os
import re
import resource
import sys
import tarfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastddpm import Schedule
from fastddpm.cli.main import main
from fastddpm.processes import displays
from fastddpm.processes.signals import Stopped
from fastddpm.sampling import job
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import fingerprint
from fastddpm.storage.indices import Indices
from fastddpm.storage.shards import FORMATS, ShardFolder
from tests.storage.test_shards import PICTURE_FORMATS
from tests.support.check import error_line
from tests.support.jobs import (
    command,
    commands,
    contents,
    die_storing,
    drawn,
    finished,
    note_drawn,
    options,
    save_tiny,
    tiny_unet,
)
from tests.support.processes import run_ranks, start

SCHEDULE = Schedule(num_train_timesteps=6)
INDICES = [7, *range(20, 31), 3, 1 << 40]  # 14 samples: shards of 4, 4, 4 and 2, each of batches of 3 and what is left
FLAGS = f"--indices 7,20-30,3,{1 << 40} --shard-size 4 --quiet"
WAYS = {"batches": "--batch-size 3", "invariant": "--batch-invariant"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """{number of processes: a folder with a folder FORMAT-WAY and a log of each job}"""
    found = {}
    for size in (1, 2, 3):
        found[size] = folder = tmp_path_factory.mktemp(f"ranks-{size}")
        jobs = [
            options(
                tiny, folder / f"{form}-{way}", f"{FLAGS} --format {form} {flags} --json-log {folder}/{form}-{way}.log"
            )
            for form in PICTURE_FORMATS
            for way, flags in WAYS.items()
        ]
        assert run_ranks(folder, size, commands, *jobs) == ([0] * size, [""] * size)
    return found


def read(folder, form, k):
    """The samples of shard k, read without fastddpm: uint8 [n, 4, 4, 1]."""
    shard = INDICES[4 * k : 4 * k + 4]
    if form == "npz":
        return np.load(folder / f"{k:013d}.npz")["arr_0"]
    if form == "png":
        return np.stack([np.asarray(Image.open(folder / f"{i:013d}.png"))[..., None] for i in shard])
    with tarfile.open(folder / f"{k:013d}.tar") as tar:
        assert tar.getnames() == [f"{i:013d}.png" for i in shard]
        return np.stack([np.asarray(Image.open(tar.extractfile(name)))[..., None] for name in tar.getnames()])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", PICTURE_FORMATS)
def test_several_processes_write_the_folder_of_one(folders, tiny, form, way):
    """The same files, byte for byte; the images are those of `Sampler.sample` with the batches of each shard."""
    one, two, three = (contents(folder / f"{form}-{way}") for folder in folders.values())
    assert one == two == three
    files = [f"{n:013d}{FORMATS[form]}" for n in (INDICES if form == "png" else range(4))]
    records = [f".shards/{k:013d}" for k in range(4)]
    assert sorted(one) == sorted([".shards", "manifest.json", *files, *records])
    sampler = Sampler.from_pretrained(tiny, device="cpu", batch_invariant=way == "invariant")
    for k in range(4):
        want = sampler.sample(INDICES[4 * k : 4 * k + 4], output="uint8", progress=False, batch_size=3)
        assert np.array_equal(read(folders[3] / f"{form}-{way}", form, k), want)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", PICTURE_FORMATS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shards_are_shared_evenly(folders, size, form, way):
    """The last JSON line of each job has the number of samples that each process has drawn."""
    last = json.loads((folders[size] / f"{form}-{way}.log").read_text().splitlines()[-1])
    want = {1: [14], 2: [8, 6], 3: [6, 4, 4]}[size]
    assert [rank["images"] for rank in last["ranks"]] == [rank["of"] for rank in last["ranks"]] == want
    assert [rank["drawn"] for rank in last["ranks"]] == want
    assert [rank["state"] for rank in last["ranks"]] == ["done"] * size
    assert (last["images"], last["of"], last["eta_s"]) == (14, 14, 0)


def arrays(store):
    return np.concatenate(list(store.arrays()))


def test_batch_invariant_samples_have_the_same_bits_in_any_shards(tmp_path):
    """Whatever other indices are drawn, in any order and with any batch_size."""
    net = tiny_unet()
    sampler = Sampler(net, SCHEDULE, device="cpu", batch_invariant=4)
    want = dict(zip(range(23), sampler.sample(23, progress=False, output="uint8").numpy(), strict=True))
    for size, batch, samples in (
        (1, None, range(9)),
        (5, 2, range(23)),
        (3, 64, [8, 2, 21]),
        (100, 1, [*range(22, -1, -1)]),
    ):
        settings = {"shard_size": size, "batch_size": batch, "format": "npz", "progress": False}
        store = job.sample_to(tmp_path / str(size), sampler, samples, **settings)
        assert np.array_equal(arrays(store), np.stack([want[i] for i in samples]))


@pytest.mark.slow
def test_killed_job_resumes_with_another_number_of_processes(folders, tiny, tmp_path):
    """Three processes that are killed, then one that is killed, then two: each draws only missing samples."""
    out = tmp_path / "out"
    arguments = options(tiny, out, f"{FLAGS} {WAYS['batches']} --format npz --shard-size 1")
    want = job.sample_to(
        tmp_path / "want",
        Sampler.from_pretrained(tiny, device="cpu"),
        INDICES,
        format="npz",
        shard_size=1,
        batch_size=3,
        progress=False,
    )
    note, done = functools.partial(note_drawn, tmp_path), set()
    for size, dies, reached in ((3, 1, 3), (1, 4, 7), (2, None, 14)):
        hooks = [note] if dies is None else [note, functools.partial(die_storing, dies)]
        statuses, _ = run_ranks(tmp_path, size, command, arguments, *hooks)
        assert statuses == [0 if dies is None else -9] * size
        took = [index for part in drawn(tmp_path) for index in part]
        assert len(set(took)) == len(took)
        assert set(took).isdisjoint(done)
        if dies is None:
            assert set(took) == set(INDICES) - done
        done = finished(out)
        assert len(done) == reached
    assert contents(out) == contents(want.path)


def damage_truncate(out, name):
    (out / name).write_bytes((out / name).read_bytes()[:-7])


def damage_flip(out, name):
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 1
    (out / name).write_bytes(content)


def damage_remove(out, name):
    (out / name).unlink()


def damage_empty(out, name):
    (out / name).write_bytes(b"")


@pytest.mark.parametrize("form", PICTURE_FORMATS)
def test_restart_draws_only_torn_shards(tmp_path, form, monkeypatch):
    """Shards 1 to 6 of 8, or their records, are truncated, changed, missing or empty."""
    out, sampler = tmp_path / "out", Sampler(tiny_unet(), SCHEDULE, device="cpu")
    settings = {"format": form, "shard_size": 2, "batch_size": 2, "progress": False}
    job.sample_to(out, sampler, 16, **settings)
    want = contents(out)
    first = [f"{2 * k if form == 'png' else k:05d}{FORMATS[form]}" for k in range(8)]
    damage_truncate(out, first[1])
    damage_flip(out, first[2])
    damage_remove(out, first[3])
    damage_remove(out, ".shards/00004")
    damage_empty(out, ".shards/00005")
    damage_flip(out, ".shards/00006")
    (out / ".shards" / ".00004.0.fastddpm-tmp").write_bytes(b"left by a kill")
    whole = [out / first[0], out / first[7], out / ".shards/00000", out / ".shards/00007"]
    before, took, sample = [path.stat() for path in whole], [], sampler.sample
    monkeypatch.setattr(
        sampler, "sample", lambda samples, **settings: took.extend(samples) or sample(samples, **settings)
    )
    job.sample_to(out, sampler, 16, **settings)
    assert took == list(range(2, 14))
    assert contents(out) == want
    after = [path.stat() for path in whole]
    assert [(s.st_ino, s.st_mtime_ns) for s in after] == [(s.st_ino, s.st_mtime_ns) for s in before]
    job.sample_to(out, sampler, 16, **settings)
    assert len(took) == 12  # nothing was missing


CHANGES = {
    "seed": {"--seed": "1"},
    "steps": {"--steps": "3"},
    "kind": {"--sampler": "ddim"},
    "eta": {"--sampler": "ddim", "--eta": "0.5"},
    "noise": {"--no-noise": ""},
    "precision": {"--precision": "bf16"},
    "samples": {"--num-samples": "4"},
    "samples ": {"--num-samples": "", "--indices": "4,0-3"},
    "format": {"--format": "webdataset"},
    "shard_size": {"--shard-size": "3"},
    "batch_size": {"--batch-size": "1"},
    "batch_invariant": {"--batch-size": "", "--batch-invariant": ""},
}


def written(changes):
    flags = {"--num-samples": "5", "--format": "npz", "--shard-size": "2", "--batch-size": "2", "--precision": "fp32"}
    flags |= changes
    bare = ("--no-noise", "--batch-invariant")
    return "--quiet " + " ".join(f"{flag} {value}" for flag, value in flags.items() if value or flag in bare)


def refused(arguments, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"fastddpm: error: .+\n", err)
    return err


def states(folder):
    """The contents of a folder, and the times of the last changes."""
    return contents(folder), {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("name", CHANGES)
def test_other_samples_are_refused(tiny, tmp_path, capsys, name):
    """The error names what differs, with both values; the folder does not change."""
    out = tmp_path / "out"
    assert main(options(tiny, out, written({}))) == 0
    before = states(out)
    message = refused(options(tiny, out, written(CHANGES[name])), capsys)
    assert f'"{name.strip()}": ' in message
    assert message.count(f'"{name.strip()}": ') == 2
    assert f"{out} holds samples with " in message
    assert message.endswith("; name another folder\n")
    assert states(out) == before


def test_other_weights_labels_schedules_and_machines_are_refused(tiny, tmp_path, capsys, monkeypatch):
    models = {
        name: save_tiny(tmp_path / name, **settings)
        for name, settings in (("other", {"seed": 1}), ("classes", {"num_class_embeds": 3}))
    }
    for name, model, labels in (("plain", tiny, ""), ("labelled", models["classes"], "--class-labels 0-2")):
        assert main(options(model, tmp_path / "out" / name, f"{written({})} {labels}")) == 0
    plain, labelled = tmp_path / "out" / "plain", tmp_path / "out" / "labelled"
    before = states(tmp_path / "out")
    message = refused(options(models["other"], plain, written({})), capsys)
    assert re.search(r'with "model": \{"sha256": "\w{64}"\}, not "model": \{"sha256": "\w{64}"\};', message)
    message = refused(options(models["classes"], labelled, f"{written({})} --class-labels 1,2"), capsys)
    assert 'with "class_labels": "0-2", not "class_labels": "1-2"; name' in message
    message = refused(options(models["classes"], plain, f"{written({})} --class-labels 1,2"), capsys)
    assert 'with "class_labels": null, "model": {"config": {"num_class_embeds": null}' in message
    sampler = Sampler.from_pretrained(tiny, device="cpu", precision="fp32")
    settings = {"format": "npz", "shard_size": 2, "batch_size": 2, "progress": False}
    message = error_line(job.sample_to, plain, sampler, 5, timesteps=[5, 1, 0], **settings)
    assert '"timesteps": null' in message
    assert '"timesteps": [0, 1, 5]' in message
    sampler.schedule = Schedule(num_train_timesteps=6, beta_end=0.03)
    assert '"schedule": {"beta_end": 0.02}, not "schedule": {"beta_end": 0.03}; name' in error_line(
        job.sample_to, plain, sampler, 5, **settings
    )
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "__version__", "0.0.1")
        assert 'not "versions": {"fastddpm": "0.0.1"}; name' in refused(options(tiny, plain, written({})), capsys)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "2.99.0")
        assert 'not "versions": {"torch": "2.99.0"}; name' in refused(options(tiny, plain, written({})), capsys)
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9000")
        assert 'not "device": "cpu, AVX9000"; name' in refused(options(tiny, plain, written({})), capsys)
    assert states(tmp_path / "out") == before


def test_damaged_manifest_is_refused(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(options(tiny, out, written({}))) == 0
    damage_truncate(out, "manifest.json")
    before = states(out)
    assert f"{out}/manifest.json is damaged" in refused(options(tiny, out, written({})), capsys)
    assert states(out) == before


@pytest.mark.parametrize("form", PICTURE_FORMATS)
def test_folder_of_other_files_is_refused(tmp_path, form):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"cat{FORMATS[form]}").touch()
    before = states(tmp_path / "out")
    sampler = Sampler(tiny_unet(), SCHEDULE, device="cpu")
    message = error_line(job.sample_to, tmp_path / "out", sampler, 3, format=form, progress=False)
    assert f"holds cat{FORMATS[form]} but no manifest.json" in message
    assert states(tmp_path / "out") == before


def test_default_sizes_and_precision_are_those_of_the_folder(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for precision in ("bf16", "fp32"):  # one of them is not this machine's own
        flags = f"--num-samples 5 --format npz --quiet --precision {precision} --shard-size 3 --batch-size 2"
        assert main(options(tiny, out / precision, flags)) == 0
        want = contents(out / precision)
        damage_remove(out / precision, "00001.npz")
        assert main(options(tiny, out / precision, "--num-samples 5 --format npz --quiet")) == 0
        assert contents(out / precision) == want


class Elementwise(nn.Module):
    """An elementwise network: the same bits in any batch. It runs out of memory for more than `most` samples."""

    def __init__(self, most=1 << 20):
        super().__init__()
        self.scale, self.sizes = nn.Parameter(torch.tensor([0.7])), []
        self.memory = {"most": most}  # a number of the network would be part of the manifest

    def forward(self, x, t):
        self.sizes.append(len(x))
        if len(x) > self.memory["most"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore lines")
        return self.scale * x - (t.float() / 6).reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("shape", [(2, 5), (3,), (5, 4, 4)], ids=str)
def test_samples_other_than_images_are_floats(tmp_path, shape):
    sampler = Sampler(Elementwise(), SCHEDULE, shape=shape, device="cpu")
    want = sampler.sample(5, progress=False).numpy()
    assert want.dtype == np.float32
    settings = {"shard_size": 3, "batch_size": 2, "progress": False}
    for form in ("npz", "webdataset"):
        store = job.sample_to(tmp_path / form, sampler, 5, format=form, **settings)
        assert np.array_equal(arrays(store), want)
    shards = [np.load(tmp_path / "npz" / f"0000{k}.npz")["arr_0"] for k in range(2)]
    assert np.array_equal(np.concatenate(shards), want)
    with tarfile.open(tmp_path / "webdataset" / "00001.tar") as tar:
        assert tar.getnames() == ["00003.npy", "00004.npy"]
        assert np.array_equal(np.load(io.BytesIO(tar.extractfile("00004.npy").read())), want[4])
    message = error_line(job.sample_to, tmp_path / "png", sampler, 5, format="png", **settings)
    assert message == f"samples are {shape}, which are not images; write them as npz or webdataset"
    assert not (tmp_path / "png").exists()


def test_model_of_a_job_must_be_a_module(tmp_path):
    sampler = Sampler(lambda x, t: x, SCHEDULE, shape=(3,), device="cpu")
    message = error_line(job.sample_to, tmp_path / "out", sampler, 3, format="npz")
    assert message.startswith("the sampler's model is a function; want an nn.Module")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("samples", "settings", "why"),
    [
        (0, {}, "no samples were requested"),
        ([], {}, "no samples were requested"),
        (-1, {}, "samples are -1"),
        ([1, 2, 1], {}, "sample 1 is requested twice"),
        ([1 << 56], {}, "0 <= index < 2^56"),
        (3, {"format": "gif"}, "format is 'gif'; want one of npz, png, wav, webdataset"),
        (3, {"shard_size": 0}, "shard_size is 0"),
        (3, {"shard_size": True}, "shard_size is True"),
        (3, {"shard_size": 2.0}, "shard_size is 2.0"),
        (3, {"batch_size": 0}, "batch_size is 0"),
        (3, {"batch_size": "all"}, "batch_size is 'all'"),
        (3, {"seed": -1}, "seed is -1"),
        (3, {"seed": 1 << 64}, "seed is"),
        (3, {"steps": 7}, "steps is 7"),
        (3, {"timesteps": [1, 2]}, "timesteps"),
        (3, {"sampler": "euler"}, "sampler is 'euler'"),
        (3, {"eta": 0.5}, "eta"),
        (3, {"class_labels": [1]}, "not a class-conditional UNet2D"),
        (3, {"class_labels": [0, 1, 2, 3]}, "4 class labels for 3 samples"),
        (3, {"class_labels": [-1]}, "class_labels are [-1]"),
        (3, {"class_labels": [0.5]}, "class_labels are [0.5]"),
        (3, {"class_labels": 0}, "class_labels are 0; want a list"),
        (3, {"class_labels": range(10**12)}, "1000000000000 class labels for 3 samples"),
        (3, {"class_labels": Indices.parse("0-999999999999")}, "1000000000000 class labels for 3 samples"),
        (10**12, {}, "are 250000000000 shards; want at most 16777216"),
        (10**23, {}, "samples are 100000000000000000000000"),
        ("3", {}, "samples are '3'"),
        ([[1], [2, 3]], {}, "samples are [[1], [2, 3]]"),
        (3, {"shard_size": 1 << 63}, "shard_size is"),
        (3, {"batch_size": 1 << 63}, "batch_size is"),
        (3, {"seed": "0"}, "seed is '0'"),
        (3, {"seed": [0]}, "seed is [0]"),
        (3, {"format": ["png"]}, "format is ['png']"),
        (3, {"progress": "no"}, "progress is 'no'; want True or False"),
        (3, {"json_log": 0}, "json_log is 0; want a path"),
        (3, {"json_log": "a\0b"}, "cannot be the name of a file"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_wrong_arguments_leave_no_folder(tmp_path, samples, settings, why):
    sampler = Sampler(tiny_unet(), SCHEDULE, device="cpu")
    settings = {"batch_size": 4} | settings
    assert why in error_line(job.sample_to, tmp_path / "out", sampler, samples, **settings)
    assert list(tmp_path.iterdir()) == []


def test_wrong_types_are_refused(tmp_path):
    sampler = Sampler(tiny_unet(), SCHEDULE, device="cpu")
    assert error_line(job.sample_to, 0, sampler, 3) == "out is 0; want a path"
    assert "cannot be the name of a file" in error_line(job.sample_to, "\ud800", sampler, 3)
    message = error_line(job.sample_to, tmp_path / "out", sampler.schedule, 3)
    assert message.startswith("from_sampler is Schedule(")
    assert message.endswith("; want a Sampler")
    assert list(tmp_path.iterdir()) == []


def test_labels_are_repeated_over_the_samples(tmp_path):
    """Across shards, in the order of the samples; a class-conditional model without labels is refused."""
    sampler = Sampler(tiny_unet(num_class_embeds=3), SCHEDULE, device="cpu")
    samples, labels = [4, 0, 9, 2, 7], [2, 0, 2, 0, 2]
    parts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    want = [
        sampler.sample(samples[at], class_labels=labels[at], batch_size=2, progress=False, output="uint8")
        for at in parts
    ]
    settings = {"class_labels": iter([2, 0]), "shard_size": 2, "batch_size": 2, "format": "npz", "progress": False}
    job.sample_to(tmp_path / "out", sampler, iter(samples), **settings)
    for k, at in enumerate(parts):
        with np.load(tmp_path / "out" / f"0000{k}.npz") as shard:
            assert np.array_equal(shard["arr_0"], want[k])
            assert shard["arr_1"].tolist() == labels[at]
    for wrong, why in ((None, "pass class_labels"), ([3], "class_labels are [3]"), ([], "class_labels")):
        assert why in error_line(job.sample_to, tmp_path / "wrong", sampler, 5, **settings | {"class_labels": wrong})
    assert not (tmp_path / "wrong").exists()


def test_arguments_of_other_types(tmp_path):
    sampler = Sampler(tiny_unet(), SCHEDULE, device="cpu")
    settings = {"format": "npz", "shard_size": 2, "progress": False}
    want = job.sample_to(tmp_path / "want", sampler, [5, 1, 2], timesteps=[4, 2, 1], seed=3, **settings)
    once = {"timesteps": iter([4, 2, 1]), "seed": np.int64(3)}
    got = job.sample_to(tmp_path / "got", sampler, iter([5, 1, 2]), **once, **settings)
    assert contents(got.path) == contents(want.path)


def test_halved_batch_size_holds_for_later_shards(tmp_path):
    """The samples are the same. A batch size that ran out of memory is not tried again."""
    net = Elementwise(most=3)
    sampler, settings = Sampler(net, SCHEDULE, shape=(1, 4, 4), device="cpu"), {"shard_size": 8, "batch_size": 8}
    with pytest.warns(UserWarning, match="out of memory; continuing with batches of") as warned:
        job.sample_to(tmp_path / "hungry", sampler, 20, **settings, progress=False)
    assert [str(w.message).partition(".")[0][-1] for w in warned] == ["4", "2"]
    assert [size for size in net.sizes if size > 2] == [8, 4]
    plenty = Sampler(Elementwise(), SCHEDULE, shape=(1, 4, 4), device="cpu")
    job.sample_to(tmp_path / "plenty", plenty, 20, **settings, progress=False)
    assert contents(tmp_path / "hungry") == contents(tmp_path / "plenty")


def test_job_ends_without_memory_for_one_sample(tmp_path):
    sampler = Sampler(Elementwise(most=0), SCHEDULE, shape=(1, 4, 4), device="cpu")
    with pytest.warns(UserWarning, match="continuing with batches of 1"), pytest.raises(torch.OutOfMemoryError):
        job.sample_to(tmp_path / "out", sampler, 4, batch_size=2, progress=False)
    assert sorted(contents(tmp_path / "out")) == [".shards", "manifest.json"]


class Held:
    """Makes `ShardFolder.write` wait for the event `go`, and counts the shards drawn."""

    def __init__(self, monkeypatch, sampler):
        self.go, self.taken, self.drawn = threading.Event(), threading.Event(), 0
        write, sample = ShardFolder.write, sampler.sample

        def held(store, k, samples):
            self.taken.set()
            assert self.go.wait(60)
            write(store, k, samples)

        def counted(samples, **settings):
            x = sample(samples, **settings)
            self.drawn += 1
            return x

        monkeypatch.setattr(ShardFolder, "write", held)
        monkeypatch.setattr(sampler, "sample", counted)


def test_drawing_waits_for_a_slow_writer(tmp_path, monkeypatch):
    sampler = Sampler(tiny_unet(), SCHEDULE, device="cpu")
    held = Held(monkeypatch, sampler)
    settings = {"shard_size": 1, "format": "npz", "progress": False}
    thread = threading.Thread(target=job.sample_to, args=(tmp_path / "out", sampler, 12), kwargs=settings)
    thread.start()
    most, until = job.WAITING + 1, time.monotonic() + 60
    while held.drawn < most and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)  # enough to draw one more, if drawing did not wait
    assert held.drawn == most
    held.go.set()
    thread.join()
    assert held.drawn == 12
    assert finished(tmp_path / "out") == set(range(12))


def test_finished_shards_are_written_after_ctrl_c(tmp_path, monkeypatch):
    sampler = Sampler(tiny_unet(), SCHEDULE, device="cpu")
    held = Held(monkeypatch, sampler)
    sample = sampler.sample

    def interrupted(samples, **settings):
        if held.drawn == 2:
            assert held.taken.wait(60)
            threading.Timer(0.2, held.go.set).start()
            raise KeyboardInterrupt
        return sample(samples, **settings)

    monkeypatch.setattr(sampler, "sample", interrupted)
    with pytest.raises(Stopped) as stopped:
        job.sample_to(tmp_path / "out", sampler, 12, shard_size=3, format="npz", progress=False)
    assert str(stopped.value) == "stopped: 6 of 12 samples are done; the same command resumes the job"
    assert stopped.value.number == 2
    assert finished(tmp_path / "out") == set(range(6))


@pytest.mark.parametrize("failing", [0, 2, 5])
def test_error_in_the_writer_ends_the_job(tmp_path, monkeypatch, failing):
    """In any shard, even the last. The shards before it are finished, and few are drawn after it."""
    sampler = Sampler(tiny_unet(), SCHEDULE, device="cpu")
    took, write, sample = [], ShardFolder.write, sampler.sample

    def broken(store, k, samples):
        if k == failing:
            raise OSError(28, "No space left on device")
        write(store, k, samples)

    monkeypatch.setattr(ShardFolder, "write", broken)
    monkeypatch.setattr(
        sampler, "sample", lambda samples, **settings: took.append(samples) or sample(samples, **settings)
    )
    with pytest.raises(OSError, match="No space left"):
        job.sample_to(tmp_path / "out", sampler, 12, shard_size=2, format="npz", progress=False)
    assert len(took) <= failing + job.WAITING + 1
    done = finished(tmp_path / "out")
    assert done >= set(range(2 * failing))
    assert done.isdisjoint({2 * failing, 2 * failing + 1})


@pytest.mark.slow
def test_processes_report_their_progress(tiny, tmp_path):
    """As plain lines where there is no terminal, and as JSON lines appended to the log."""
    log = tmp_path / "logs" / "log.jsonl"
    log.parent.mkdir()
    before = json.dumps(dict.fromkeys(displays._KEYS, 0))
    log.write_text(f'{before}\n{{"ti')  # of a job that was killed
    arguments = options(tiny, tmp_path / "out", f"--num-samples 9 --batch-size 2 --json-log {log}")
    statuses, (output, other) = run_ranks(tmp_path, 2, command, arguments)
    assert (statuses, other) == ([0, 0], "")
    *lines, last = [line for line in output.splitlines() if not line.startswith("fastddpm: drawing")]
    rates = r"[\d.e+-]+ images/s, [\d.e+-]+ steps/s, ETA (\d+:\d+|\?)"
    form = rf"\d of 9 samples, {rates}; process 0: \d of 5, {rates}; process 1: \d of 4, {rates}"
    assert lines
    assert all(re.fullmatch(form, line) for line in lines), output
    assert lines[-1].startswith("9 of 9 samples, ")
    assert re.search(r"process 0: 5 of 5, .*; process 1: 4 of 4, ", lines[-1])
    assert re.fullmatch(rf"{tmp_path}/out: all 9 samples are done; [\d.]+ s this time", last)
    zero, *new = log.read_text().splitlines()
    assert zero == before
    *_, final = map(json.loads, new)
    assert (final["images"], final["of"], final["drawn"], final["eta_s"]) == (9, 9, 9, 0)
    assert [(rank["rank"], rank["state"], rank["images"], rank["of"]) for rank in final["ranks"]] == [
        (0, "done", 5, 5),
        (1, "done", 4, 4),
    ]
    assert all(rank["images_per_s"] > 0 and rank["steps_per_s"] > 0 for rank in final["ranks"])


def keep_books(folder, order):
    """Print twice how many samples are done, and by how many MB a job of a million has grown this process so far."""

    def stop(*args, **settings):
        raise KeyboardInterrupt

    sampler = Sampler(tiny_unet(), SCHEDULE, device="cpu")
    job.sample_to(folder / "small", sampler, 4, format="npz", progress=False)  # imports what there is to import
    sampler.sample = stop
    samples = 10**6 if order == "counted" else np.random.default_rng(0).permutation(10**6).tolist()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        try:
            job.sample_to(folder / "large", sampler, samples, format="npz", progress=False)
        except Stopped as stopped:
            print(*str(stopped).split()[1:5], sep="-", end=" ")
            print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["counted", "at random"])
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ru_maxrss is in other units")
def test_bookkeeping_of_a_million_samples_is_small(tmp_path, order):
    process = start(tmp_path / "output", keep_books, tmp_path, order)
    process.join()
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 0, output
    done, first, again, second = output.split()
    assert done == again == "0-of-1000000-samples"
    assert 0 <= float(first) <= float(second) < (20 if order == "counted" else 200)


def test_logs_that_would_damage_a_folder_are_refused(tmp_path):
    """A name that the folder uses, and a file that is not a log, before anything is written."""
    sampler, out = Sampler(tiny_unet(), SCHEDULE, device="cpu"), tmp_path / "out"
    settings = {"format": "npz", "batch_size": 2, "progress": False}
    (tmp_path / "link").symlink_to("out/manifest.json")
    for name in ("out/manifest.json", "out/00000.npz", "out/.shards/00000", "out/dataset.json", "link"):
        message = error_line(job.sample_to, out, sampler, 3, json_log=tmp_path / name, **settings)
        assert message == (
            f"json_log is {tmp_path / name}, whose name the folder of the samples uses itself; name another file"
        )
        assert not out.exists()
    job.sample_to(out, sampler, 3, json_log=out / "log.jsonl", **settings)
    job.sample_to(out, sampler, 3, json_log=out / "log.jsonl", **settings)
    assert [json.loads(line)["images"] for line in (out / "log.jsonl").read_text().splitlines()][-1] == 3
    config = tmp_path / "config.json"
    config.write_text('{"sample_size": 4}')
    before = contents(tmp_path)
    assert f"{config} is not a log" in error_line(job.sample_to, out, sampler, 3, json_log=config, **settings)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("form", PICTURE_FORMATS)
@pytest.mark.parametrize("first", [4, 5, 3])
def test_folder_grows(tmp_path, form, first, monkeypatch):
    """Only the further samples are drawn; the finished ones keep their files. Each part is in batches of its own."""
    sampler = Sampler(tiny_unet(num_class_embeds=3), SCHEDULE, device="cpu")
    settings = {"format": form, "class_labels": [2, 0, 1], "shard_size": 4, "batch_size": 3, "progress": False}
    for stops in (False, True):
        out = tmp_path / str(stops)
        job.sample_to(out, sampler, first, **settings)
        before = states(out)
        took, sample = [], sampler.sample

        def noting(samples, took=took, sample=sample, stops=stops, **how):
            if stops and len(took) == 4:
                took.append("stopped")
                raise KeyboardInterrupt
            took.extend(samples)
            return sample(samples, **how)

        with monkeypatch.context() as patched:
            patched.setattr(sampler, "sample", noting)
            if stops:
                with pytest.raises(Stopped, match=f"stopped: {first + 4} of 11 samples are done"):
                    job.sample_to(out, sampler, 11, **settings)
            store = job.sample_to(out, sampler, 11, **settings)
        assert [index for index in took if index != "stopped"] == list(range(first, 11))
        changed = {name for name, content in before[0].items() if contents(out)[name] != content}
        assert changed == {"manifest.json"} | ({"dataset.json"} if form == "png" else set())
        assert store.manifest["grown_from"] == [first]
    assert contents(tmp_path / "True") == contents(tmp_path / "False")
    parts = [
        *[range(k, min(k + 4, first)) for k in range(0, first, 4)],
        *[range(k, min(k + 4, 11)) for k in range(first, 11, 4)],
    ]
    labels = [2, 0, 1] * 4
    want = [
        sampler.sample(
            part, class_labels=[labels[i] for i in part], batch_size=3, progress=False, output="uint8"
        ).numpy()
        for part in parts
    ]
    assert np.array_equal(arrays(store), np.concatenate(want))
    if first == 4:  # whole shards: the samples of one job
        whole = job.sample_to(tmp_path / "whole", sampler, 11, **settings)
        assert np.array_equal(arrays(store), arrays(whole))
        files = {name: content for name, content in contents(whole.path).items() if name.startswith("0")}
        assert {name: contents(out)[name] for name in files} == files


def test_folder_grows_by_the_command(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    for count in (5, 5, 8, 8):
        assert main(options(tiny, out, written({"--num-samples": f"{count}"}))) == 0
    assert len(ShardFolder.open(out).samples) == 8
    before = states(out)
    message = refused(options(tiny, out, written({"--num-samples": "5"})), capsys)
    assert 'holds samples with "samples": "0-7", not "samples": "0-4"; name another folder' in message
    assert states(out) == before


def test_grown_folder_of_invariant_samples_has_the_samples_of_one_job(tmp_path):
    sampler = Sampler(tiny_unet(), SCHEDULE, device="cpu", batch_invariant=4)
    settings = {"format": "npz", "shard_size": 4, "progress": False}
    for count in (3, 9, 10):
        store = job.sample_to(tmp_path / "grown", sampler, count, **settings)
    whole = job.sample_to(tmp_path / "whole", sampler, 10, **settings)
    assert store.manifest["grown_from"] == [3, 9]
    assert np.array_equal(arrays(store), arrays(whole))


def test_latents_are_not_written_as_images(tmp_path, monkeypatch):
    """Also where they have the channels of an image."""
    sampler = Sampler(Elementwise(), SCHEDULE, shape=(3, 4, 4), device="cpu")
    sampler._about = replace(sampler._about, decoder=tmp_path / "vae")
    settings = {"shard_size": 3, "batch_size": 2, "progress": False}
    message = error_line(job.sample_to, tmp_path / "png", sampler, 5, format="png", **settings)
    want = "samples are (3, 4, 4) latents, which the VAE of the pipeline turns into images; write them as npz or"
    assert message == f"{want} webdataset"
    floats = sampler.sample(5, progress=False).numpy()
    for form in ("npz", "webdataset"):
        store = job.sample_to(tmp_path / form, sampler, 5, format=form, **settings)
        assert store.manifest["latents"] is True
        assert np.array_equal(arrays(store), floats)


def changed_by(what, net):
    """Change the weights of a network in one of several ways."""
    weight = next(net.parameters())
    with torch.no_grad():
        if what == "in place":
            weight.mul_(1.5)
        elif what == "through .data":
            weight.data[0] = 3
        elif what == "one bit":
            weight.view(torch.int32).view(-1)[0] ^= 1
        elif what == "loaded":
            net.load_state_dict(tiny_unet(seed=1).state_dict())
        elif what == "another tensor":
            net.conv_in.weight = nn.Parameter(weight * 2)
        else:
            net.conv_in.register_buffer("more", torch.ones(2))


@pytest.mark.parametrize("what", ["in place", "through .data", "one bit", "loaded", "another tensor", "a buffer"])
def test_weights_that_change_meanwhile_end_the_job(tmp_path, what, monkeypatch):
    """While the third shard is drawn: the finished shards stay, and no shard of other weights is written."""
    net = tiny_unet()
    sampler, settings = Sampler(net, SCHEDULE, device="cpu"), {"format": "npz", "shard_size": 2, "progress": False}
    want = job.sample_to(tmp_path / "want", sampler, 8, **settings)
    sample, shards = sampler.sample, []

    def changing(samples, **how):
        shards.append(samples)
        x = sample(samples, **how)
        if len(shards) == 3:
            changed_by(what, net)
        return x

    monkeypatch.setattr(sampler, "sample", changing)
    message = error_line(job.sample_to, tmp_path / "out", sampler, 8, **settings)
    assert message.startswith("the model's weights were changed while the job ran; ")
    assert len(shards) == 3
    assert finished(tmp_path / "out") == {0, 1, 2, 3}
    again = Sampler(tiny_unet(), SCHEDULE, device="cpu")
    job.sample_to(tmp_path / "out", again, 8, **settings)
    assert contents(tmp_path / "out") == contents(want.path)


@pytest.mark.parametrize("name", ["manifest.json", "00001.npz", ".shards/00001"])
def test_files_deleted_meanwhile_end_the_job(tmp_path, name, monkeypatch):
    """After all else is done; the same command then completes the folder."""
    sampler, settings = (
        Sampler(tiny_unet(), SCHEDULE, device="cpu"),
        {"format": "npz", "shard_size": 2, "progress": False},
    )
    want = job.sample_to(tmp_path / "want", sampler, 8, **settings)
    write, out = ShardFolder.write, tmp_path / "out"

    def deleting(store, k, samples):
        write(store, k, samples)
        if k == 3:
            (out / name).unlink()

    with monkeypatch.context() as patched:
        patched.setattr(ShardFolder, "write", deleting)
        message = error_line(job.sample_to, out, sampler, 8, **settings)
    want_message = f"files of {out} were deleted while the job ran; give the same command again, which draws what is"
    assert message == f"{want_message} missing"
    job.sample_to(out, sampler, 8, **settings)
    assert contents(out) == contents(want.path)


def doubled(module, inputs, output):
    return 2 * output


def halved(module, inputs, output):
    return 0.5 * output


def test_jobs_of_networks_with_other_code_are_other_jobs(tmp_path):
    """A hook, or a method that was replaced, is part of what is sampled."""
    settings = {"format": "npz", "shard_size": 2, "progress": False}

    def sampler(*changes):
        net = Elementwise()
        for change in changes:
            change(net)
        return Sampler(net, SCHEDULE, shape=(3,), device="cpu")

    hook, other = lambda net: net.register_forward_hook(doubled), lambda net: net.register_forward_hook(halved)
    job.sample_to(tmp_path / "plain", sampler(), 4, **settings)
    job.sample_to(tmp_path / "plain", sampler(), 6, **settings)
    job.sample_to(tmp_path / "hooked", sampler(hook), 4, **settings)
    job.sample_to(tmp_path / "hooked", sampler(hook), 6, **settings)
    for out, changed in (("plain", sampler(hook)), ("hooked", sampler()), ("hooked", sampler(other))):
        message = error_line(job.sample_to, tmp_path / out, changed, 6, **settings)
        assert 'holds samples with "code": {"hooks": ' in message


def test_pipe_as_a_manifest_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "manifest.json")
    assert "manifest.json is a pipe or a device" in refused(options(tiny, tmp_path / "out", written({})), capsys)


@pytest.mark.parametrize("field", ["seed", "precision", "batch_size", "shard_size", "shape", "model", "code"])
def test_manifest_with_a_field_of_another_type_is_refused(tiny, tmp_path, capsys, field):
    out = tmp_path / "out"
    assert main(options(tiny, out, written({}))) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, field: "7"}))
    message = refused(options(tiny, out, written({"--precision": ""})), capsys)
    assert f"{out}/manifest.json is damaged (" in message
    assert f"{field} is '7'; want" in message
