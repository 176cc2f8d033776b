"""Small training runs for tests: options, pictures, and what a run has written."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from fastddpm import Schedule, checkpoints
from fastddpm.processes.distributed import Ranks
from fastddpm.train import TrainOptions, train
from fastddpm.train.trainer import Trainer

__all__ = ["SMALL", "assert_same", "batch", "losses", "parameters", "pictures", "run"]

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
    """[n, 8, 8, channels] uint8: bright squares at random places on black."""
    rng = np.random.default_rng(0)
    data = np.zeros((n, 8, 8, channels), np.uint8)
    for image, (i, j) in zip(data, rng.integers(0, 4, (n, 2)), strict=True):
        image[i : i + 4, j : j + 4] = rng.integers(128, 256, channels)
    return data


def run(out, options=SMALL, data=None, **arguments):
    """Train on the data (by default `pictures()`), without a progress bar."""
    return train(pictures() if data is None else data, out, options, progress=False, **arguments)


def batch(data, k, options=SMALL, labels=None, ranks=None):
    """The batch of step k."""
    with TemporaryDirectory() as out:
        return Trainer(data, labels, Path(out), options, ranks or Ranks()).batches.of_step(k)


def parameters(folder):
    """The weights of the checkpoint in a folder."""
    return checkpoints.load(folder).parameters


def losses(folder):
    """[(step, loss)] of the log in a folder."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
