"""The state that a run is resumed from: nothing of a damaged or hostile one reaches the run or its checkpoint."""

import dataclasses
import errno
import os
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastddpm.processes.distributed import Ranks
from fastddpm.train import state
from fastddpm.train.state import STATE, RunState, save_state
from fastddpm.train.trainer import Trainer
from tests.support.check import error_line
from tests.support.training import SMALL, assert_same, parameters, pictures, run

SHORT = dataclasses.replace(SMALL, steps=1)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def compressed(path):
    """A zip bomb: a part that is a thousand times as large as the file."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("training/data/99", bytes(1 << 24))


class Touch:
    """Unpickling it creates the file `ran`."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def changed(part, **values):
    """A damage that replaces values in a part of the state."""

    def damage(path):
        held = torch.load(path, weights_only=True)
        torch.save({**held, part: held[part] | values}, path)

    return damage


def changed_moment(i, **values):
    """A damage that replaces what the optimiser keeps of a parameter; a function is applied to the old value."""

    def damage(path):
        held = torch.load(path, weights_only=True)
        of = held["optimizer"]["state"]
        new = {name: value(of[i][name]) if callable(value) else value for name, value in values.items()}
        of[i] = {name: value for name, value in {**of[i], **new}.items() if value is not None}
        torch.save(held, path)

    return damage


def without_checksum(path):
    """As older versions wrote it."""
    path.write_bytes(path.read_bytes()[: -len(state._checksum(b""))])


def with_a_flipped_bit(path):
    """In a tensor's values."""
    without_checksum(path)
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
    content = bytearray(path.read_bytes())
    content[part.header_offset + part.file_size // 2] ^= 4
    path.write_bytes(content)


def with_parts_marked_as_folders(path):
    """For which torch.load returns memory without values."""
    without_checksum(path)
    with zipfile.ZipFile(path) as archive:
        parts = [(part, archive.read(part)) for part in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts:
            part.external_attr |= 0x10 * ("/data/" in part.filename)
            archive.writestr(part, content)


def test_a_state_of_an_older_version_resumes(tmp_path):
    want = parameters(run(tmp_path, SHORT))
    without_checksum(tmp_path / STATE)
    assert_same(parameters(run(tmp_path, SHORT)), want)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (with_a_flipped_bit, "its checksum is wrong"),
        (with_parts_marked_as_folders, "an entry of the archive is a folder"),
        (truncated, "BadZipFile"),
        (a_pipe, "is a pipe or a device; want a file"),
        (compressed, "its parts are compressed or overlap"),
        (lambda path: path.write_text("notes on a training"), "BadZipFile"),
        (lambda path: path.write_bytes(b""), "BadZipFile"),
        (lambda path: torch.save({"step": 2}, path), "KeyError"),
        (lambda path: torch.save([torch.zeros(2)], path), "it is [tensor([0., 0.])]; want a dictionary"),
        (lambda path: torch.save({**torch.load(path, weights_only=True), "net": {}}, path), "net lacks"),
        (lambda path: torch.save(Touch(), path), "UnpicklingError"),
        (changed("progress", step="2"), "its step is '2'; want a whole number, at least 0"),
        (changed("progress", step=True), "its step is True"),
        (changed("progress", step=10**6), "its steps is 1; want a whole number, at least 1000000"),
        (changed("progress", seconds=float("nan")), "its seconds is nan"),
        (changed("progress", losses=["a"]), "a loss is 'a'"),
        (changed("progress", losses=7), "TypeError"),
        (changed("progress", how=[1]), "its how is [1]; want a dictionary"),
        (changed("run", steps=None), "its steps is None"),
        (changed("run", data=torch.zeros(2)), "TypeError"),
        (changed("optimizer", state=[]), "the optimizer's state is []; want a dictionary"),
        (changed("optimizer", state={}), "optimizer lacks"),
        (changed("optimizer", state={"a": {}}), "optimizer lacks 0"),
        (changed_moment(0, exp_avg=torch.zeros(3)), "optimizer 0 has (3,) torch.float32 as exp_avg"),
        (changed_moment(0, exp_avg=lambda value: value.double()), "torch.float64 as exp_avg"),
        (changed_moment(0, exp_avg_sq=lambda value: value.to_sparse()), "training.pt"),  # torch 2.15 itself
        (changed_moment(0, exp_avg_sq=7), "optimizer 0 has int as exp_avg_sq"),
        (changed_moment(0, step=torch.zeros(2)), "optimizer 0 has (2,) torch.float32 as step"),
        (changed_moment(0, exp_avg=None), "optimizer 0 lacks exp_avg"),
        (changed_moment(0, more=torch.zeros(2)), "optimizer 0 has 'more', which is not of this network"),
        (changed("net", **{"conv_in.bias": torch.zeros(9)}), "net has (9,) torch.float32 as conv_in.bias"),
        (changed("ema", **{"conv_in.bias": torch.zeros(8, dtype=torch.float16)}), "ema has (8,) torch.float16"),
        (changed("ema", **{"conv_in.bias": torch.zeros(8, device="meta")}), "ema has (8,) torch.float32"),
        (changed("ema", more=torch.zeros(9)), "ema has 'more', which is not of this network"),
    ],
)  # fmt: skip
def test_damaged_state_is_refused(tmp_path, monkeypatch, damage, why):
    monkeypatch.chdir(tmp_path)
    out = run(tmp_path / "run", SHORT)
    before = parameters(out)
    damage(out / STATE)
    line = error_line(run, out, SHORT)
    assert line.startswith(f"{out / STATE} is damaged, or no run wrote it (")
    assert why in line
    assert line.endswith(f"; train into another folder, from the checkpoint beside it if that is whole (--init {out})")
    assert_same(parameters(out), before)
    assert not Path("ran").exists()


def test_precision_in_a_state_is_checked(tmp_path):
    run(tmp_path, SHORT)
    changed("progress", how={"precision": [1]})(tmp_path / STATE)
    line = error_line(run, tmp_path, dataclasses.replace(SHORT, precision="auto"))
    assert line.startswith(f"cannot resume the run in {tmp_path}: its precision is [1]; want one of ")


def test_flipped_bit_is_refused(tmp_path):
    """Anywhere but in the mark of the checksum: then the state is one of an older version, and the same."""
    run(tmp_path, SHORT)
    content, before = (tmp_path / STATE).read_bytes(), parameters(tmp_path)
    mark = content.rindex(b"fastddpm crc32 ")
    directory = content.rindex(b"PK\1\2")  # bit 4 of its byte 38 makes torch read a part as a folder: as nothing
    for place in (0, 100, len(content) // 2, directory + 38, mark - 1, len(content) - 1):
        flipped = content[:place] + bytes([content[place] ^ 1 << 4]) + content[place + 1 :]
        (tmp_path / STATE).write_bytes(flipped)
        assert "training.pt is damaged, or no run wrote it (its checksum is wrong)" in error_line(run, tmp_path, SHORT)
        assert_same(parameters(tmp_path), before)
    (tmp_path / STATE).write_bytes(content[:mark])
    assert_same(parameters(run(tmp_path, SHORT)), before)


def test_unreadable_state_is_not_reported_as_damaged(tmp_path, monkeypatch):
    run(tmp_path)
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / STATE))
    monkeypatch.setattr(Path, "read_bytes", mock.Mock(side_effect=error))
    with pytest.raises(PermissionError):
        run(tmp_path)


def test_state_without_steps_is_that_of_a_new_run(tmp_path):
    first = Trainer(pictures(), None, tmp_path / "run", SHORT, Ranks())
    (tmp_path / "run").mkdir()
    save_state(tmp_path / "run", first.identity, first.parts, RunState())
    assert_same(parameters(run(tmp_path / "run", SHORT)), parameters(run(tmp_path / "whole", SHORT)))
