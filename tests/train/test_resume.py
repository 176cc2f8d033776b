"""Resuming a run: to the same bits after a kill, only with the same images and options, never over other files."""

import dataclasses
import errno
import json
import os
import sys
from contextlib import contextmanager
from subprocess import PIPE, Popen

import numpy as np
import pytest
import torch

from fastddpm import Schedule, checkpoints
from fastddpm.processes.distributed import Ranks
from fastddpm.storage import files
from fastddpm.train import TrainOptions, run_folder, trainer
from fastddpm.train.options import OF_SEQUENCES
from fastddpm.train.state import LongerRunError, RunState, save_state
from fastddpm.train.trainer import Trainer
from tests.support.check import error_line
from tests.support.training import SMALL, assert_same, losses, parameters, pictures, run


class Killed(BaseException):
    """Stands for a kill: the trainer must not catch it."""


def killed_run(monkeypatch, owner, name, call, out, options=SMALL, **arguments):
    """Run until call number `call`, counted from 1, of owner.name raises Killed."""
    original, calls = getattr(owner, name), []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            run(out, options, **arguments)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(trainer, "update_average", 2), (trainer, "update_average", 4), (checkpoints, "save", 1)],
)
def test_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch, owner, name, call, dropout):
    options = dataclasses.replace(SMALL, dropout=dropout, log_every=1)
    whole = run(tmp_path / "whole", options)
    killed_run(monkeypatch, owner, name, call, tmp_path / "killed", options)
    again = run(tmp_path / "killed", options)
    assert_same(parameters(whole), parameters(again))
    assert losses(whole) == losses(again)
    assert [step for step, _ in losses(again)] == [1, 2, 3, 4]


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_killed_run_drops_the_same_labels(tmp_path, monkeypatch, variance_type):
    schedule = Schedule(num_train_timesteps=5, variance_type=variance_type)
    options = dataclasses.replace(SMALL, label_dropout=0.5, log_every=1, sample_every=0, schedule=schedule)
    labels, bare = np.arange(7) % 3, dataclasses.replace(options, label_dropout=0.0)
    whole = run(tmp_path / "whole", options, labels=labels)
    killed_run(monkeypatch, trainer, "update_average", 4, tmp_path / "killed", options, labels=labels)
    again = run(tmp_path / "killed", options, labels=labels)
    assert_same(parameters(whole), parameters(again))
    assert losses(whole) == losses(again)
    assert losses(whole) != losses(run(tmp_path / "bare", bare, labels=labels))
    assert '"label_dropout": 0.5' in error_line(run, again, bare, labels=labels)


def test_run_of_an_older_version_lacks_some_options(tmp_path):
    before = parameters(run(tmp_path))
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    for name in ("label_dropout", "frame", "kernel_size"):
        del state["run"][name]
    torch.save(state, tmp_path / "training.pt")
    assert_same(parameters(run(tmp_path)), before)


def test_checkpoint_missed_by_a_kill_is_written_on_resume(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    killed_run(monkeypatch, checkpoints, "save", 2, tmp_path / "killed")
    assert_same(parameters(whole), parameters(run(tmp_path / "killed")))


def test_resume_repairs_the_log_and_adds_up_the_seconds(tmp_path, monkeypatch):
    killed_run(monkeypatch, trainer, "update_average", 3, tmp_path)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    done = state["progress"]
    assert (done["step"], done["seconds"] < 1000, len(done["losses"])) == (2, True, 2)
    torch.save({**state, "progress": done | {"seconds": 1000.0}}, tmp_path / "training.pt")
    for name in (".training.pt.0.fastddpm-tmp", "unet/.config.json.1.fastddpm-tmp", ".training.pt.1.tmp"):
        (tmp_path / name).touch()
    kept = '{"step": 2, "loss": 0.5, "seconds": 1.0}'
    (tmp_path / "log.jsonl").write_bytes(
        f'{kept}\n7\n{{"step": 3, "loss": 0.5}}\n{{"step": 4, "lo'.encode() + b"\0\xff"
    )
    run(tmp_path)
    first, last = (tmp_path / "log.jsonl").read_text().splitlines()
    assert first == kept
    assert json.loads(last)["step"] == 4
    assert 1000 < json.loads(last)["seconds"] < 2000
    assert [path.name for path in tmp_path.rglob(".*tmp")] == [".training.pt.1.tmp"]  # the user's own


def test_finished_run_is_not_changed(tmp_path):
    out = run(tmp_path)
    before = (out / "training.pt").read_bytes()
    run(tmp_path)
    assert (out / "training.pt").read_bytes() == before


@pytest.mark.parametrize("held", ["unet/config.json", "model_index.json", "config.json", "classes.json"])
def test_checkpoint_of_another_origin_is_not_overwritten(tmp_path, held):
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).write_text("{}")
    line = error_line(run, tmp_path)
    assert f"holds a checkpoint ({held.split('/')[0]}) but no training.pt to resume; train into another folder" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / held]


@pytest.mark.parametrize(
    "text",
    [
        '{"iteration": 1}\n',
        "epoch,loss\n1,0.5\n",
        "epoch,loss",
        "[1, 2",
        '{"step": 1, "accuracy": 1}\n',
        '{"step": "a", "loss": 1}',
        '{"step": NaN, "loss": 1}',
        '{"step": 1, "loss": 0.3}\n{"step": 2, "no\n{"step": 3, "loss": 0.3}\n',
    ],
)
def test_log_of_another_origin_is_not_overwritten(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    line = error_line(run, tmp_path)
    assert line == f"{tmp_path} holds a log.jsonl that no run wrote; train into another folder"
    assert (tmp_path / "log.jsonl").read_text() == text


@pytest.mark.parametrize("rest", ["", "{", '{"step": 4, "lo', '{"step": 4, "loss": 0.3}\n{"st'])
def test_incomplete_log_line_is_dropped(tmp_path, rest):
    (tmp_path / "log.jsonl").write_text(rest)
    assert [step for step, _ in losses(run(tmp_path))] == [4]


def test_temporary_files_of_other_runs_stay(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".training.pt.7.tmp").touch()
    run(tmp_path)
    assert (tmp_path / "other" / ".training.pt.7.tmp").exists()


@pytest.mark.parametrize("full", ["training.pt", "diffusion_pytorch_model.safetensors", "loss.png", "step-0000004.png"])
def test_full_disk_is_reported_with_a_way_out(tmp_path, monkeypatch, full):
    """It names the file; nothing is left of the attempt, and the same command goes on once there is space."""
    whole, replacing = run(tmp_path / "whole"), files._replacing

    @contextmanager
    def replaced(target):
        with replacing(target) as file:
            if target.name == full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield file

    with monkeypatch.context() as patch:
        patch.setattr(files, "_replacing", replaced)
        with pytest.raises(OSError, match="No space left on device") as failed:
            run(tmp_path / "full")
    assert os.path.basename(failed.value.filename) == full
    assert failed.value.strerror == "No space left on device; free some space, then give the same command again"
    assert not list((tmp_path / "full").rglob(f"*{files.TEMPORARY}"))
    assert_same(parameters(run(tmp_path / "full")), parameters(whole))


@pytest.mark.parametrize("name", ["log.jsonl", "loss.png"])
def test_pipe_in_the_folder_is_refused_before_the_work(tmp_path, monkeypatch, name):
    """Writing to it would wait for a reader."""
    monkeypatch.setattr(Trainer, "step", None)
    os.mkfifo(tmp_path / name)
    assert error_line(run, tmp_path) == f"{tmp_path / name} is a pipe or a device; want a file"


def test_pipe_in_place_of_the_checkpoint_is_refused(tmp_path):
    run(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert error_line(run, tmp_path) == f"{weights} is a pipe or a device; want a file"


def test_unwritable_log_is_named(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as failed:
        run_folder.append_to_log(tmp_path, {"step": 1})
    assert failed.value.filename == str(tmp_path / "log.jsonl")


def test_two_processes_do_not_share_a_folder(tmp_path):
    whole = run(tmp_path / "whole")
    (tmp_path / "held").mkdir()
    code = "import sys; from fastddpm.storage.files import locked\nwith locked(sys.argv[1]): print(flush=True); input()"
    with Popen([sys.executable, "-c", code, tmp_path / "held"], stdin=PIPE, stdout=PIPE) as other:
        other.stdout.readline()
        line = error_line(run, tmp_path / "held")
        other.kill()
    assert f"{tmp_path / 'held'} is being written by another process; wait until it has ended, or name" in line
    assert_same(parameters(whole), parameters(run(tmp_path / "held")))


def test_another_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    line = error_line(run, tmp_path, dataclasses.replace(SMALL, learning_rate=1.0))
    started = '"learning_rate": 0.0005'
    assert line == f"{tmp_path} holds a run that was started with {started}; use the same, or another folder"


@pytest.mark.parametrize(("done", "steps"), [(3, 24), (3, 10), (4, 3)])
def test_length_may_change_while_the_rates_are_the_same(tmp_path, monkeypatch, done, steps):
    """During the warm-up; the run then ends as one that had this length from the beginning."""
    options = dataclasses.replace(SMALL, warmup=9, save_every=1, sample_every=0, log_every=1)
    killed_run(monkeypatch, trainer, "update_average", done, tmp_path / "run", dataclasses.replace(options, steps=20))
    longer = dataclasses.replace(options, steps=steps)
    assert_same(parameters(run(tmp_path / "run", longer)), parameters(run(tmp_path / "whole", longer)))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("done", [4, 5])
def test_longer_run_is_refused_with_its_way_out(tmp_path, monkeypatch, done):
    out, options = tmp_path / "run", dataclasses.replace(SMALL, steps=5, save_every=1)
    if done == 5:
        run(out, options)
    else:
        killed_run(monkeypatch, trainer, "update_average", done + 1, out, options)
    with pytest.raises(LongerRunError) as refused:
        run(out, dataclasses.replace(options, steps=12))
    first = "" if done == 5 else "finish it with --steps 5, then "
    assert refused.value.more == 7
    assert str(refused.value) == (
        f"{out} holds a run of 5 steps, and the learning rates of its steps follow from that number, so that 12 steps "
        f"are another run; to train on, {first}start a run of 7 steps from it with --init, in another folder"
    )
    assert 'started with "steps": 5' in error_line(run, out, dataclasses.replace(options, steps=3))


FIXED = {  # an option that decides the weights, and another value than in SMALL
    **{"steps": 5, "batch_size": 4, "learning_rate": 1e-3, "warmup": 1, "ema": 0.5, "weight_decay": 0.0},
    **{"grad_clip": 2.0, "flip": True, "channels": (8, 8), "layers": 2, "attention": (), "groups": 2},
    **{"dropout": 0.1, "label_dropout": 0.1, "seed": 1, "schedule": Schedule(num_train_timesteps=21)},
}
FREE = {"log_every": 3, "save_every": 3, "sample_every": 3, "precision": "bf16", "engine": "auto"}


@pytest.mark.parametrize("name", sorted(FIXED.keys() - {"steps"}))
def test_other_options_do_not_resume(tmp_path, name):
    labels = np.arange(7) % 3
    run(tmp_path, dataclasses.replace(SMALL, steps=1), labels=labels)
    line = error_line(run, tmp_path, dataclasses.replace(SMALL, steps=1, **{name: FIXED[name]}), labels=labels)
    assert f'holds a run that was started with "{name}"' in line


def test_options_that_may_change_on_resume(tmp_path):
    before = parameters(run(tmp_path))
    assert_same(parameters(run(tmp_path, dataclasses.replace(SMALL, **FREE))), before)
    fields = {field.name for field in dataclasses.fields(TrainOptions)}
    assert fields == FIXED.keys() | FREE.keys() | {"init", *OF_SEQUENCES}


def test_default_warmup_may_be_spelled_out(tmp_path):
    options = dataclasses.replace(SMALL, steps=20, warmup=None, save_every=20)
    before = parameters(run(tmp_path, options))
    assert_same(parameters(run(tmp_path, dataclasses.replace(options, warmup=2))), before)
    assert '"warmup": 2' in error_line(run, tmp_path, dataclasses.replace(options, warmup=0))


def test_other_images_do_not_resume(tmp_path):
    run(tmp_path)
    other = pictures()
    other[3, 2, 1] ^= 1
    assert f'{tmp_path} holds a run that was started with "data": {{"crc32": ' in error_line(run, tmp_path, data=other)
    assert '"data": {"shape": [7, 8, 8, 1]}' in error_line(run, tmp_path, data=pictures().reshape(7, 4, 16, 1))


def test_other_labels_do_not_resume(tmp_path):
    labels = np.arange(7) % 3
    run(tmp_path / "with", labels=labels)
    run(tmp_path / "without")
    assert 'holds a run that was started with "labels": {"crc32": ' in error_line(run, tmp_path / "with")
    line = error_line(run, tmp_path / "without", labels=labels)
    assert 'holds a run that was started with "labels": null; use the same' in line
    assert '"labels": {"crc32": ' in error_line(run, tmp_path / "with", labels=(labels + 1) % 3)


def test_error_names_what_differs_in_the_schedule(tmp_path):
    run(tmp_path)
    options = dataclasses.replace(SMALL, schedule=dataclasses.replace(SMALL.schedule, beta_end=0.03))
    line = error_line(run, tmp_path, options)
    started = f'"schedule": {{"beta_end": {SMALL.schedule.beta_end}}}'
    assert line == f"{tmp_path} holds a run that was started with {started}; use the same, or another folder"


@pytest.mark.parametrize("before", ["fp32", "bf16"])
def test_resumed_run_keeps_its_precision(tmp_path, before):
    run(tmp_path, dataclasses.replace(SMALL, precision=before))
    for asked, used in (("auto", before), ("fp32", "fp32"), ("bf16", "bf16")):
        resumed = Trainer(pictures(), None, tmp_path, dataclasses.replace(SMALL, precision=asked), Ranks())
        resumed.resume()
        assert resumed.compute.precision == used
        resumed.run(progress=False)
        save_state(tmp_path, resumed.identity, resumed.parts, resumed.state)
        assert torch.load(tmp_path / "training.pt")["progress"]["how"]["precision"] == used
        first = RunState(step=4, setup={"precision": before})
        save_state(tmp_path, resumed.identity, resumed.parts, first)


def test_precision_of_the_run_may_be_unavailable(tmp_path):
    first = Trainer(pictures(), None, tmp_path, SMALL, Ranks(device="cpu"))
    save_state(tmp_path, first.identity, first.parts, RunState(setup={"precision": "tf32"}))
    line = error_line(run, tmp_path, dataclasses.replace(SMALL, precision="auto"), device="cpu")
    why = "its precision is 'tf32', which 'cpu' does not have; use fp32 or bf16"
    assert line == f"cannot resume the run in {tmp_path}: {why}"
