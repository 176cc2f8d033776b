"""Keeps the states x_t of a run of the sampler for a picture of the way from noise to the samples."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import trajectory
from fastddpm.storage.images import to_uint8

MOST_SAMPLES = {".gif": 64, ".png": 8}  # in a picture
MOST_PIXELS = {".gif": 1 << 20, ".png": 1 << 19}  # of these samples together


class Trajectory:
    """A callback of `Sampler.sample` that keeps some of the states.

    Args:
        samples: the indices that are drawn; the first of them are shown.
        labels: the class of each, by which the picture is arranged or its rows are named; None: none.
        steps: how many steps the run takes.
        path: of the picture, a .gif or a .png.
    Attributes:
        about: what the picture shows, in words.
    """

    def __init__(self, sampler: Sampler, samples: Sequence[int], labels: Sequence[int] | None, steps: int, path: str):
        self.path, self.names = path, sampler.classes
        self.steps = trajectory.shown_steps(steps, path)
        suffix = Path(path).suffix.lower()
        most = min(MOST_SAMPLES[suffix], max(1, MOST_PIXELS[suffix] // math.prod(sampler.shape[1:])))
        self.samples = list(samples[:most])
        self.labels = None if labels is None else labels[:most]
        self.states: dict[tuple[int, int], Tensor] = {}  # by step and sample index
        self.timesteps: dict[int, int] = {}
        self.about = f"the way to {len(self.samples)} samples, in {len(self.steps) + 1} pictures"

    def __call__(self, step: int, t: int, x_0: Tensor, indices: Tensor, x_t: Tensor) -> None:
        if step in self.steps:
            self.timesteps[step] = t
            wanted = set(self.samples)
            states = to_uint8(x_t.nan_to_num()).cpu()  # the sampler itself names the samples with NaN
            for index, state in zip(indices.tolist(), states, strict=True):
                if index in wanted:
                    self.states[step, index] = state

    def save(self, samples: Tensor) -> None:
        """Write the picture. Args: samples: uint8 [N, H, W, C]: the samples that were drawn."""
        frames = [torch.stack([self.states[step, index] for index in self.samples]) for step in self.steps]
        frames.append(samples[: len(self.samples)])
        array = np.stack([frame[..., :3].numpy() for frame in frames])  # without alpha
        timesteps = [self.timesteps[step] for step in self.steps]
        trajectory.save_trajectory(array, timesteps, self.path, self.labels, self.names)
