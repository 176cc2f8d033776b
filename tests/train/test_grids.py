"""The grids of samples: rows of classes with their names, a bar of their own, and a bounded share of the work."""

import dataclasses
import signal

import numpy as np
import pytest
from PIL import Image

from fastddpm import Sampler
from fastddpm.processes.signals import Stopped
from fastddpm.storage.class_grid import class_grid
from fastddpm.train import TrainOptions, grids, train
from fastddpm.train.grids import GridPlan
from fastddpm.train.options import grid_steps
from tests.support.check import error_line
from tests.support.training import SMALL, assert_same, losses, parameters, pictures, run

LONG = TrainOptions()


@pytest.mark.parametrize(
    ("classes", "rows", "columns"), [(1, 1, 8), (3, 3, 8), (10, 10, 6), (32, 32, 2), (33, 8, 8), (None, 8, 8)]
)
def test_long_run_has_rows_of_classes(classes, rows, columns):
    plan = GridPlan.of(LONG, classes)
    assert plan.samples == rows * columns
    assert plan.labels == (None if classes is None else tuple(i % classes for i in range(plan.samples)))


@pytest.mark.parametrize("classes", [None, 3, 10])
@pytest.mark.parametrize("batch_size", [1, 32, 4096])
@pytest.mark.parametrize("sample_every", [1, 100, 10**6])
@pytest.mark.parametrize("steps", [1, 30, 500, 50_000])
def test_grids_take_a_tenth_of_the_work(steps, sample_every, batch_size, classes):
    """In calls of the network, of which a step on an image is three; the last grid may take more if it is the least."""
    options = TrainOptions(steps=steps, batch_size=batch_size, sample_every=sample_every)
    plan = GridPlan.of(options, classes)
    assert plan.every % sample_every == 0
    cost, work = plan.samples * grid_steps(options), 3 * steps * batch_size
    assert cost * (steps // plan.every) <= 0.1 * work
    assert cost <= 0.1 * work or plan.samples == (4 if classes is None else classes)


def test_every_grid_that_is_affordable_is_drawn():
    assert GridPlan.of(LONG, None).every == LONG.sample_every
    assert GridPlan.of(dataclasses.replace(LONG, sample_every=1), None).every == 167  # 6400 calls, at 38.4 in a step


def test_run_may_have_no_grids(tmp_path):
    out = run(tmp_path, dataclasses.replace(SMALL, sample_every=0))
    assert not (out / "samples").exists()
    assert_same(parameters(out), parameters(run(tmp_path / "with")))


def test_grid_names_its_rows(tmp_path):
    names = ("trousers", "bag", "a coat")
    out = run(tmp_path, labels=np.arange(7) % 3, classes=names)
    plan = GridPlan.of(SMALL, 3)
    samples = Sampler.from_pretrained(out, precision="fp32").sample(
        plan.samples, class_labels=plan.labels, steps=20, output="uint8", progress=False
    )
    with Image.open(out / "samples" / "step-0000004.png") as drawn:
        assert np.array_equal(np.asarray(drawn), class_grid(samples.numpy(), plan.labels, names)[..., 0])


def test_grid_has_its_own_bar_outside_the_estimate(tmp_path, monkeypatch, capsys):
    """The clock of the bar of steps stands still while a grid is drawn."""
    unpaused = []
    monkeypatch.setattr(grids, "_SHARE", 1e6)
    monkeypatch.setattr("tqdm.tqdm.unpause", lambda bar: unpaused.append(bar.desc))
    train(pictures(), tmp_path, dataclasses.replace(SMALL, sample_every=1), device="cpu")
    shown = capsys.readouterr().err
    assert "grid of samples: " in shown
    assert "train: 100%" in shown
    drawn = len(list((tmp_path / "samples").iterdir()))
    assert drawn == 4
    assert unpaused == ["train"] * drawn


def test_grids_may_come_before_the_first_log_line(tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "_SHARE", 1e6)
    out = run(tmp_path, dataclasses.replace(SMALL, sample_every=1, log_every=3))
    assert [step for step, _ in losses(out)] == [3, 4]
    assert len(list((tmp_path / "samples").iterdir())) == 4


def test_interrupted_grid_is_drawn_on_resume(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    sample = Sampler.sample

    def interrupted(*args, progress, **options):
        signal.raise_signal(signal.SIGINT)
        return sample(*args, progress=progress, **options)

    with monkeypatch.context() as patch:
        patch.setattr(grids.Sampler, "sample", interrupted)
        with pytest.raises(Stopped, match="stopped after step 4 of 4; the same command resumes the run"):
            run(tmp_path / "run")
    assert not list((tmp_path / "run" / "samples").iterdir())
    run(tmp_path / "run")
    name = "samples/step-0000004.png"
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_diverged_network_is_not_sent_to_another_checkpoint(tmp_path, monkeypatch):
    def diverged(*args, **options):
        raise ValueError("the network returned NaN or infinity; try another checkpoint")

    monkeypatch.setattr(grids.Sampler, "sample", diverged)
    line = error_line(run, tmp_path)
    what = "the network of step 4 draws no finite samples, so the run has diverged"
    assert line == f"{what}; lower learning_rate (0.0005) in a run in another folder"
