"""Runs that start from a checkpoint, and resume with or without it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from fastddpm import Schedule, checkpoints
from fastddpm.train import TrainOptions
from tests.support.check import error_line
from tests.support.training import assert_same, parameters, pictures, run

STARTED = TrainOptions(steps=4, batch_size=3, warmup=2, save_every=2, sample_every=4, precision="fp32")


def test_run_starts_from_a_checkpoint(tmp_path):
    """With its weights, layout and schedule: a tiny learning rate leaves the weights unchanged."""
    first = run(tmp_path / "first")
    options = dataclasses.replace(STARTED, init=str(first), steps=1, learning_rate=1e-30)
    second = run(tmp_path / "second", options)
    assert_same(parameters(first), parameters(second))
    got, want = checkpoints.load(second), checkpoints.load(first)
    assert (got.config, got.schedule) == (want.config, want.schedule)
    assert got.schedule.num_train_timesteps == 20


@pytest.mark.parametrize("options", [{"channels": (8, 16, 24)}, {"dropout": 0.1}, {"num_train_timesteps": 20}], ids=str)
def test_options_that_the_checkpoint_brings_are_refused(tmp_path, options):
    first, name = run(tmp_path / "first"), *options
    asked = {"schedule": Schedule(**options)} if name == "num_train_timesteps" else options
    line = error_line(run, tmp_path / "second", dataclasses.replace(STARTED, init=str(first), **asked))
    given = f"{name} is {options[name]!r}"
    assert line == f"{given}, but init brings its own layout and schedule; leave out one of the two"


def test_run_resumes_after_its_initial_checkpoint_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, relative = run(tmp_path / "first"), dataclasses.replace(STARTED, init="first")
    options = dataclasses.replace(STARTED, init=str(first))
    before = parameters(run(tmp_path / "second", options))
    first.rename(tmp_path / "elsewhere")
    for same in (options, relative):
        assert_same(parameters(run(tmp_path / "second", same)), before)
        assert "first" in error_line(run, tmp_path / "third", same)
    other = dataclasses.replace(STARTED, init="elsewhere")
    assert f'holds a run that was started with "init": "{first}"' in error_line(run, tmp_path / "second", other)


@pytest.mark.parametrize("lost", ["training.pt", "unet/diffusion_pytorch_model.safetensors"])
def test_run_without_its_own_checkpoint_needs_the_initial_one(tmp_path, lost):
    options = dataclasses.replace(STARTED, init=str(run(tmp_path / "first")))
    second = run(tmp_path / "second", options)
    before = parameters(second)
    (second / lost).unlink()
    if lost == "training.pt":
        shutil.rmtree(second / "unet")
        (second / "model_index.json").unlink()
    assert_same(parameters(run(second, options)), before)
    shutil.rmtree(tmp_path / "first")
    (second / lost).unlink()
    assert "first" in error_line(run, second, options)


@pytest.mark.parametrize("damaged", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
def test_damaged_own_checkpoint_is_replaced_on_resume(tmp_path, damaged):
    options = dataclasses.replace(STARTED, init=str(run(tmp_path / "first")))
    second = run(tmp_path / "second", options)
    before = parameters(second)
    half = (second / damaged).read_bytes()[:100]
    (second / damaged).unlink()  # `before` is mapped
    (second / damaged).write_bytes(half)
    assert_same(parameters(run(second, options)), before)


def test_initial_checkpoint_that_cannot_be_sampled_is_refused(tmp_path):
    first = checkpoints.load(run(tmp_path / "first"))
    no_signal = dataclasses.replace(first.schedule, rescale_betas_zero_snr=True)
    checkpoints.save(tmp_path / "no-signal", first.config, first.parameters, no_signal)
    line = error_line(run, tmp_path / "second", dataclasses.replace(STARTED, init=str(tmp_path / "no-signal")))
    assert line.startswith("prediction_type is 'epsilon', but abar is 0 at t=19")
    assert not (tmp_path / "second").exists()


def test_initial_checkpoint_that_is_not_finite_is_refused(tmp_path):
    """Its loss would be NaN, and no learning rate would help."""
    first = checkpoints.load(run(tmp_path / "first"))
    damaged = first.parameters | {"conv_in.bias": first.parameters["conv_in.bias"] * float("nan")}
    checkpoints.save(tmp_path / "damaged", first.config, damaged, first.schedule)
    line = error_line(run, tmp_path / "second", dataclasses.replace(STARTED, init=str(tmp_path / "damaged")))
    assert line == f"init is {tmp_path / 'damaged'}, whose weights are not finite; start from another checkpoint"


def test_run_starts_from_the_bundled_model(tmp_path):
    options = dataclasses.replace(STARTED, init="fashion-mnist", steps=1, learning_rate=1e-30, sample_every=0)
    out = run(tmp_path / "run", options, np.zeros((3, 28, 28, 1), np.uint8))
    before, weights = parameters("fashion-mnist"), parameters(out)
    assert before.keys() == weights.keys()
    assert all((before[name].float() - weights[name]).abs().max() < 1e-29 for name in weights)  # some were zero
    assert_same(parameters(run(out, options, np.zeros((3, 28, 28, 1), np.uint8))), weights)


def test_initial_checkpoint_of_latents_is_refused(tmp_path):
    first = run(tmp_path / "first")
    index = json.loads((first / "model_index.json").read_text())
    (first / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    line = error_line(run, tmp_path / "second", dataclasses.replace(STARTED, init=str(first)))
    assert line == f"init is {first}, whose network draws latents, not images; start from another checkpoint"


def test_initial_checkpoint_for_other_images_is_refused(tmp_path):
    first = run(tmp_path / "first")
    options = dataclasses.replace(STARTED, init=str(first))
    line = error_line(run, tmp_path / "second", options, pictures(channels=3))
    assert f"init is {first}, whose in_channels is 1; these images need 3" in line
    classes = dataclasses.replace(STARTED, init=str(run(tmp_path / "classes", labels=np.arange(7))))
    line = error_line(run, tmp_path / "second", classes)
    assert "whose num_class_embeds is 7; these images need None: give labels (--class-conditional), or start" in line
    assert "nowhere" in error_line(run, tmp_path / "second", dataclasses.replace(STARTED, init="nowhere"))
    assert not (tmp_path / "second").exists()
    assert "images are 9 x 8" in error_line(run, tmp_path / "second", options, np.zeros((2, 9, 8, 1), np.uint8))
