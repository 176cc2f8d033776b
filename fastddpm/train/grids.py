"""The grids of samples that a run draws: how large they are, how often they come, and their drawing."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import images
from fastddpm.train.options import TrainOptions, grid_steps

_MOST = 64  # samples in a grid: with labels, as many as make whole rows of classes
_SHARE = 0.1  # of the work of training that the grids may take, beside the last one
_PER_IMAGE = 3  # calls of the network that are as much work as training on an image: forward, and backward twice that


class Interrupted(Exception):
    """A signal came while a grid was drawn."""


@dataclass(frozen=True)
class GridPlan:
    """The grids of a run. They depend on its options alone, so that a resumed run draws the same ones.

    Attributes:
        samples: in each grid.
        columns: samples in a row.
        every: steps between grids; 0: none are drawn.
    """

    samples: int
    columns: int
    every: int

    @classmethod
    def of(cls, options: TrainOptions, classes: int | None) -> "GridPlan":
        """The plan for a run: whole rows, at least one, and few enough that the grids take a tenth of the training."""
        columns = 8
        if classes is not None and classes <= 16:  # every column shows one class
            columns = classes * max(1, round(8 / classes))
        work_per_step = _SHARE * _PER_IMAGE * options.batch_size  # that grids may take, in calls of the network
        affordable = int(work_per_step * options.steps / grid_steps(options))
        samples = max(min(affordable, _MOST) // columns, 1) * columns
        least = math.ceil(samples * grid_steps(options) / work_per_step)
        return cls(samples, columns, options.sample_every * math.ceil(least / max(options.sample_every, 1)))


def draw_grid(
    path: str | os.PathLike[str],
    sampler: Sampler,
    plan: GridPlan,
    options: TrainOptions,
    classes: int | None,
    *,
    show: bool,
    stopped: Callable[[], bool],
) -> None:
    """Draw samples with a bar of their own, and write the grid.

    Args: stopped: whether to stop; asked after each step.
    Raises: Interrupted: `stopped` returned True; nothing is written. ValueError: the network returned NaN or infinity.
    """
    from tqdm import tqdm

    steps = grid_steps(options)
    labels = None if classes is None else torch.arange(plan.samples, device="cpu") % classes
    with tqdm(total=steps * plan.samples, desc="grid of samples", unit="step", leave=False, disable=not show) as bar:

        def on_steps(steps: int, samples: int) -> None:
            bar.update(steps * samples)
            if stopped():
                raise Interrupted

        samples = sampler.sample(
            plan.samples, seed=options.seed, class_labels=labels, steps=steps, output="uint8", progress=on_steps
        )
    images.save_grid(samples, path, columns=plan.columns)
