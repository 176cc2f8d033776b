"""Keeps the states x_t of a run of the sampler for a picture of the way from noise to the samples."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import trajectory
from fastddpm.storage.images import to_uint8

MOST_SAMPLES = {".gif": 64, ".png": 8}  # in a picture


class Trajectory:
    """A callback of `Sampler.sample` that keeps some of the states.

    Args:
        samples: the indices that are drawn; the first of them are shown.
        steps: as `Sampler.sample` takes it.
        path: of the picture, a .gif or a .png.
    Attributes:
        about: what the picture shows, in words.
    """

    def __init__(self, sampler: Sampler, samples: Sequence[int], steps: int | None, path: str):
        self.path = path
        steps = sampler.schedule.num_train_timesteps if steps is None else steps
        self.steps = trajectory.shown_steps(steps, path)
        most = next(most for suffix, most in MOST_SAMPLES.items() if path.lower().endswith(suffix))
        self.samples = list(samples[:most])
        self.states: dict[tuple[int, int], Tensor] = {}  # by step and sample index
        self.timesteps: dict[int, int] = {}
        self.about = f"the way to {len(self.samples)} samples, in {len(self.steps) + 1} pictures"

    def __call__(self, step: int, t: int, x_t: Tensor, x_0: Tensor, indices: Tensor) -> None:
        if step in self.steps:
            self.timesteps[step] = t
            wanted = set(self.samples)
            states = to_uint8(x_t).cpu()
            for index, state in zip(indices.tolist(), states, strict=True):
                if index in wanted:
                    self.states[step, index] = state

    def save(self, samples: Tensor) -> None:
        """Write the picture. Args: samples: uint8 [N, H, W, C]: the samples that were drawn."""
        frames = [torch.stack([self.states[step, index] for index in self.samples]) for step in self.steps]
        frames.append(samples[: len(self.samples)])
        array = np.stack([frame[..., :3].numpy() for frame in frames])  # without alpha
        trajectory.save_trajectory(array, [self.timesteps[step] for step in self.steps], self.path)
