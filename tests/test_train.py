"""The trainer: Algorithm 1 on small pictures, resumable to the bit, its checkpoint readable by diffusers."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from check import assert_as_accurate, error_line
from diffusers import DDPMPipeline
from PIL import Image

from fastddpm import Sampler, Schedule, UNet2D, checkpoint, noise
from fastddpm import train as trainer
from fastddpm.reference.diffusion import Diffusion
from fastddpm.train import TrainOptions, train

SMALL = TrainOptions(
    steps=4,
    batch_size=3,
    warmup=2,
    channels=(8, 16),
    attention=(1,),
    groups=4,
    save_every=2,
    sample_every=4,
    precision="fp32",
    schedule=Schedule(num_train_timesteps=20),
)


def pictures(n=7, channels=1):
    """Bright squares on black, somewhere in 8 x 8."""
    rng = np.random.default_rng(0)
    data = np.zeros((n, 8, 8, channels), np.uint8)
    for image, (i, j) in zip(data, rng.integers(0, 4, (n, 2)), strict=True):
        image[i : i + 4, j : j + 4] = rng.integers(128, 256, channels)
    return data


def run(out, options=SMALL, data=None):
    return train(pictures() if data is None else data, out, options, progress=False)


def parameters(folder):
    return checkpoint.load(folder)[1]


def losses(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_a_run_leaves(tmp_path):
    out = run(tmp_path / "run")
    assert [step for step, _ in losses(out)] == [4]
    with Image.open(out / "samples" / "step-0000004.png") as grid:
        assert grid.size[0] > 64
    net = DDPMPipeline.from_pretrained(out).unet
    assert_same(dict(net.state_dict()), parameters(out))
    images = Sampler.from_pretrained(out).sample(2, steps=2, progress=False, output="uint8")
    assert images.shape == (2, 8, 8, 1)
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def test_one_step_is_algorithm_1(tmp_path):
    """The loss in the log is the specification's, of the initial weights at the addressed draws."""
    options = dataclasses.replace(SMALL, steps=1)
    run(tmp_path, options)
    torch.manual_seed(options.seed)
    net = UNet2D(**options.unet_config(8, 8, 1))
    pixels = torch.from_numpy(pictures()).movedim(-1, 1)
    x_0, t, address = trainer._batch(pixels, 0, options)
    assert torch.equal(address, noise.address(options.seed, 3))
    eps = noise.normal(address, (1, 8, 8), stream=noise.TRAIN, t=0)
    process = Diffusion(options.schedule.betas)
    with torch.no_grad():
        loss = process.loss(net.double(), x_0.double() / 127.5 - 1, t, eps.double())
        plain = process.loss(net.float(), x_0.float() / 127.5 - 1, t, eps)
    (_, logged) = losses(tmp_path)[0]
    assert_as_accurate(torch.tensor(logged), plain, loss)


def test_it_learns(tmp_path):
    options = dataclasses.replace(SMALL, steps=100, batch_size=16, learning_rate=4e-3, save_every=100, sample_every=100)
    run(tmp_path, options)
    by_step = dict(losses(tmp_path))
    assert by_step[100] < by_step[50] < 0.6  # predicting eps = 0 has loss 1


@pytest.mark.parametrize("stop", [2, 3])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch, stop):
    whole = run(tmp_path / "whole")

    class Killed(BaseException):
        """Nothing in the trainer may catch it."""

    average = trainer._average
    calls = []

    def killed_in_step(*args):
        calls.append(args)
        if len(calls) > stop:
            raise Killed
        average(*args)

    monkeypatch.setattr(trainer, "_average", killed_in_step)
    with pytest.raises(Killed):
        run(tmp_path / "killed")
    monkeypatch.setattr(trainer, "_average", average)
    again = run(tmp_path / "killed")
    assert_same(parameters(whole), parameters(again))
    assert losses(whole) == losses(again)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    out = run(tmp_path)
    before = (out / "training.pt").read_bytes()
    run(tmp_path)
    assert (out / "training.pt").read_bytes() == before


def test_two_runs_are_the_same_and_another_seed_is_not(tmp_path):
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    assert_same(parameters(a), parameters(b))
    other = run(tmp_path / "c", dataclasses.replace(SMALL, seed=1))
    assert not torch.equal(parameters(a)["conv_in.weight"], parameters(other)["conv_in.weight"])


def test_every_epoch_sees_every_image_once_in_a_new_order():
    pixels = torch.arange(7, dtype=torch.uint8).reshape(7, 1, 1, 1)
    seen = torch.cat([trainer._batch(pixels, k, SMALL)[0].flatten() for k in range(14)]).tolist()
    epochs = [seen[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_flips_mirror_half_of_the_images():
    pixels = torch.tensor([[0, 1]], dtype=torch.uint8).expand(100, 1, 1, 2)
    options = dataclasses.replace(SMALL, batch_size=100, flip=True)
    flipped = sum(int(trainer._batch(pixels, k, options)[0][:, 0, 0, 0].sum()) for k in range(10))
    assert abs(flipped - 500) <= 5 * 1000**0.5 / 2  # five standard deviations


def test_colour_bf16_and_clipping(tmp_path):
    options = dataclasses.replace(SMALL, precision="bf16", flip=True, dropout=0.1)
    out = run(tmp_path, options, pictures(channels=3))
    assert parameters(out)["conv_in.weight"].dtype == torch.float32
    assert checkpoint.load(out)[0]["in_channels"] == 3


def test_another_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    line = error_line(run, tmp_path, dataclasses.replace(SMALL, learning_rate=1.0))
    assert line == f'{tmp_path} holds a run with other "learning_rate": 0.0005; give those, or another folder'


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    line = error_line(run, tmp_path, dataclasses.replace(SMALL, learning_rate=1e38, grad_clip=1e38))
    assert "the loss is" in line
    assert "lower learning_rate" in line


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (np.zeros((2, 8, 8), np.uint8), {}, "data is uint8 (2, 8, 8)"),
        (np.zeros((2, 8, 8, 1), np.float32), {}, "data is float32"),
        (np.zeros((0, 8, 8, 1), np.uint8), {}, "at least one image"),
        (np.zeros((2, 7, 8, 1), np.uint8), {}, "images are 7 x 8; with 2 levels both sides must be multiples of 2"),
        (None, {"steps": 0}, "steps is 0"),
        (None, {"batch_size": 1.5}, "batch_size is 1.5"),
        (None, {"schedule": Schedule(prediction_type="v_prediction")}, "prediction_type is 'v_prediction'"),
        (None, {"groups": 3}, "groups is 3; want a divisor of each of channels, 8, 16"),
        (None, {"precision": "fp8"}, "precision is 'fp8'"),
    ],
    ids=str,
)
def test_bad_input_leaves_nothing_behind(tmp_path, data, options, message):
    assert message in error_line(run, tmp_path / "run", dataclasses.replace(SMALL, **options), data)
    assert not (tmp_path / "run").exists()
