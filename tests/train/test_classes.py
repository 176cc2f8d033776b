"""The names of classes: kept in the run and its checkpoint, printed, and matched with those of --init."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline

from fastddpm import Sampler, UNet2D, checkpoints
from fastddpm.processes.distributed import Ranks
from fastddpm.train import TrainOptions, train
from fastddpm.train.trainer import Trainer
from tests.support.check import error_line
from tests.support.training import SMALL, assert_same, parameters, pictures, run

NAMES = ("1", "2", "10")
LABELS = np.arange(7) % 3
ONE_STEP = dataclasses.replace(SMALL, steps=1)
STARTED = TrainOptions(steps=1, batch_size=3, precision="fp32")


def test_names_are_kept_in_the_run_and_printed(tmp_path, capsys):
    train(pictures(), tmp_path, ONE_STEP, labels=LABELS, classes=NAMES, device="cpu")
    assert json.loads((tmp_path / "classes.json").read_text()) == ["1", "2", "10"]
    assert checkpoints.load(tmp_path).classes == Sampler.from_pretrained(tmp_path).classes == NAMES
    printed = capsys.readouterr().err.splitlines()[1]
    assert printed == f"{tmp_path}: classes (kept in classes.json): 0 1, 1 2, 2 10"


def test_lost_names_are_written_again(tmp_path):
    run(tmp_path, ONE_STEP, labels=LABELS, classes=NAMES)
    (tmp_path / "classes.json").unlink()
    run(tmp_path, ONE_STEP, labels=LABELS, classes=NAMES)
    assert checkpoints.load(tmp_path).classes == NAMES


def test_other_names_do_not_resume(tmp_path):
    run(tmp_path, ONE_STEP, labels=LABELS, classes=NAMES)
    line = error_line(run, tmp_path, ONE_STEP, labels=LABELS, classes=("1", "10", "2"))
    assert f'{tmp_path} holds a run that was started with "classes": ["1", "2", "10"]; use the same' in line
    assert '"classes": ["1", "2", "10"]' in error_line(run, tmp_path, ONE_STEP, labels=LABELS)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (LABELS, ("1", "2"), "classes are ('1', '2'); want 3 distinct names, one for each class"),
        (LABELS, ("1", "2", "2"), "want 3 distinct names"),
        (LABELS, "abc", "classes are 'abc'; want 3 distinct names"),
        (LABELS, (1, 2, 3), "classes are (1, 2, 3); want 3 distinct names"),
        (LABELS, 0, "classes are 0; want 3 distinct names"),
        (None, NAMES, "classes are ('1', '2', '10'), but there are no labels; give both, or neither"),
    ],
)
def test_bad_names_are_refused(tmp_path, labels, classes, message):
    assert message in error_line(run, tmp_path / "run", labels=labels, classes=classes)
    assert not (tmp_path / "run").exists()


def started_from(first, out, labels, classes):
    return Trainer(pictures(), labels, out, dataclasses.replace(STARTED, init=str(first)), Ranks(), classes)


@pytest.mark.parametrize("classes", [("1", "2", "10"), ("10", "1", "2"), ("1", "10")])
def test_labels_are_numbered_as_in_the_initial_checkpoint(tmp_path, classes):
    """By name, also where the images lack a class."""
    first = run(tmp_path / "first", ONE_STEP, labels=LABELS, classes=NAMES)
    labels = np.arange(7) % len(classes)
    trainer = started_from(first, tmp_path / "second", labels, classes)
    assert [NAMES[label] for label in trainer.batches.labels.tolist()] == [classes[label] for label in labels]
    assert trainer.class_names == NAMES
    assert trainer.net.config["num_class_embeds"] == 3


def test_class_that_the_initial_checkpoint_lacks_is_refused(tmp_path):
    first = run(tmp_path / "first", ONE_STEP, labels=LABELS, classes=NAMES)
    line = error_line(started_from, first, tmp_path / "second", LABELS, ("1", "2", "3"))
    assert line == (
        f"init is {first}, whose classes are ['1', '2', '10']; the images have another, '3': leave it out, rename it, "
        "or start from another checkpoint"
    )


def test_numbers_keep_the_names_of_the_initial_checkpoint(tmp_path):
    first = run(tmp_path / "first", ONE_STEP, labels=LABELS, classes=NAMES)
    options = dataclasses.replace(STARTED, init=str(first))
    second = run(tmp_path / "second", options, labels=LABELS)
    assert checkpoints.load(second).classes == NAMES
    before = parameters(second)
    assert_same(parameters(run(second, options, labels=LABELS)), before)


def test_initial_checkpoint_without_names_is_taken_to_have_the_natural_order(tmp_path):
    first = run(tmp_path / "first", ONE_STEP, labels=LABELS)
    with pytest.warns(UserWarning, match="does not name its classes; they are taken to be 0, 1, .* older fastddpm"):
        trainer = started_from(first, tmp_path / "second", LABELS, NAMES)
    assert trainer.class_names == NAMES
    started_from(first, tmp_path / "third", LABELS, ("1", "2", "3"))  # in the order of any version


DROPPED = dataclasses.replace(ONE_STEP, label_dropout=0.5)


def test_label_dropout_adds_the_null_label(tmp_path):
    """The network, the names and the grid: a row for each class, none for the null label."""
    out = run(tmp_path, dataclasses.replace(DROPPED, sample_every=1), labels=LABELS, classes=NAMES)
    held = checkpoints.load(out)
    assert (held.config["num_class_embeds"], held.null_label, held.classes) == (4, 3, NAMES)
    before = parameters(out)
    (out / "unet" / "config.json").unlink()
    assert_same(parameters(run(tmp_path, DROPPED, labels=LABELS, classes=NAMES)), before)
    assert checkpoints.load(out).null_label == 3
    trainer = Trainer(pictures(), LABELS, tmp_path, DROPPED, Ranks(), NAMES)
    assert set(trainer.grids.labels) == {0, 1, 2}
    pipeline = DDPMPipeline.from_pretrained(out)
    assert pipeline.unet.config.num_class_embeds == 4
    assert_same(dict(pipeline.unet.state_dict()), before)


def test_label_dropout_trains_the_null_label(tmp_path):
    start = run(tmp_path / "start", dataclasses.replace(DROPPED, learning_rate=1e-30), labels=LABELS)
    trained = run(tmp_path / "trained", dataclasses.replace(DROPPED, steps=8, weight_decay=0.0), labels=LABELS)
    moved = (parameters(trained)["class_embedding.weight"] - parameters(start)["class_embedding.weight"]).abs().amax(1)
    assert moved.shape == (4,)
    assert (moved > 0).all()


def test_label_dropout_needs_labels(tmp_path):
    line = error_line(run, tmp_path / "run", DROPPED)
    assert line == "label_dropout is 0.5, but there are no labels; give labels (--class-conditional), or leave it out"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label_dropout", [0.0, 0.5])
@pytest.mark.parametrize("classes", [NAMES, ("10", "1"), None])
def test_run_that_starts_from_a_null_label_keeps_it(tmp_path, label_dropout, classes):
    first = run(tmp_path / "first", DROPPED, labels=LABELS, classes=NAMES)
    options = dataclasses.replace(STARTED, init=str(first), label_dropout=label_dropout, sample_every=0)
    labels = LABELS % len(classes or NAMES)
    second = run(tmp_path / "second", options, labels=labels, classes=classes)
    held = checkpoints.load(second)
    assert (held.config["num_class_embeds"], held.null_label, held.classes) == (4, 3, NAMES)
    before = parameters(second)
    assert_same(parameters(run(second, options, labels=labels, classes=classes)), before)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("label_dropout", [0.0, 0.5])
def test_run_adds_the_embeddings_that_its_initial_checkpoint_lacks(tmp_path, held, label_dropout):
    """Those of the classes, of the null label or of both; without a class the network computes what it did before."""
    given = {"labels": LABELS, "classes": NAMES} if held else {}
    first = run(tmp_path / "first", ONE_STEP, **given)
    options = dataclasses.replace(STARTED, init=str(first), label_dropout=label_dropout, sample_every=0)
    before = UNet2D(**checkpoints.load(first).config)
    checkpoints.load_into(before, parameters(first))
    trainer = Trainer(pictures(), LABELS, tmp_path / "second", options, Ranks(), NAMES)
    x, t, labels = torch.ones(3, 1, 8, 8), torch.tensor([5, 5, 5]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        outputs, same = trainer.net(x, t, labels), before(x, t, labels if held else None)
        assert torch.equal(outputs, same) == held
        assert not torch.equal(outputs[0], outputs[1])
        if label_dropout and not held:
            assert torch.equal(trainer.net(x, t, torch.full((3,), 3)), same)
    second = run(tmp_path / "second", options, labels=LABELS, classes=NAMES)
    got = checkpoints.load(second)
    assert (got.config["num_class_embeds"], got.null_label, got.classes) == (
        (4, 3, NAMES) if label_dropout else (3, None, NAMES)
    )
    after = parameters(second)
    assert_same(parameters(run(second, options, labels=LABELS, classes=NAMES)), after)


def test_labels_and_initial_checkpoint_must_fit(tmp_path):
    dropped = run(tmp_path / "dropped", DROPPED, labels=LABELS)
    options = dataclasses.replace(STARTED, init=str(dropped))
    assert "num_class_embeds is 4; these images need None: give labels" in error_line(run, tmp_path / "run", options)
    line = error_line(run, tmp_path / "run", options, labels=np.arange(7) % 4)
    assert f"init is {dropped}, which has 3 classes, but these images have 4; start from another checkpoint" in line
    plain = run(tmp_path / "plain", ONE_STEP, labels=LABELS)
    for label_dropout in (0.0, 0.5):
        options = dataclasses.replace(STARTED, init=str(plain), label_dropout=label_dropout)
        line = error_line(run, tmp_path / "run", options, labels=np.arange(7) % 2)
        assert f"init is {plain}, which has 3 classes, but these images have 2; start from another" in line
    assert not (tmp_path / "run").exists()
