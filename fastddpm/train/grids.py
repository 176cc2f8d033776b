"""The samples that a run draws: how many, how often, and in which file: a grid of images, spectrograms, or texts."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastddpm.checkpoints.medium import Medium
from fastddpm.core.precision import Compute
from fastddpm.networks.fused import Network
from fastddpm.processes.displays import Stderr
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.class_grid import MOST_ROWS, save_samples
from fastddpm.storage.sequence_files import save_sequences
from fastddpm.train.options import TrainOptions, grid_steps

_LEAST_SIDE, _MOST_SIDE = 2, 8  # samples in a row and in a column, without classes
_SHARE = 0.1  # of the work of training that the grids may take, beside the last one
_PER_IMAGE = 3  # calls of the network that are as much work as training on an image: forward, and backward twice that


class Interrupted(Exception):
    """A signal came while a grid was drawn."""


class Diverged(ValueError):
    """The network draws no finite samples."""


@dataclass(frozen=True)
class GridPlan:
    """The grids of a run. They depend on its options and classes alone, so that a resumed run draws the same ones.

    Attributes:
        samples: in each grid.
        every: steps between grids; 0: none are drawn.
        labels: the class of each sample; None: the network is not class-conditional.
    """

    samples: int
    every: int
    labels: tuple[int, ...] | None

    @classmethod
    def of(cls, options: TrainOptions, classes: int | None) -> "GridPlan":
        """The plan for a run: squares, or rows of a class each, so small and so rare that they are a tenth of the work.

        Args: classes: how many the network has; None: it is not class-conditional.
        """
        work_per_step = _SHARE * _PER_IMAGE * options.batch_size  # that grids may take, in calls of the network
        affordable = int(work_per_step * options.steps / grid_steps(options))
        if classes is not None and classes <= MOST_ROWS:
            samples = classes * max(min(affordable // classes, _MOST_SIDE**2 // classes, _MOST_SIDE), 1)
        else:
            samples = max(min(math.isqrt(affordable), _MOST_SIDE), _LEAST_SIDE) ** 2
        least = math.ceil(samples * grid_steps(options) / work_per_step)
        every = options.sample_every and options.sample_every * math.ceil(least / options.sample_every)
        return cls(samples, every, None if classes is None else tuple(i % classes for i in range(samples)))


def draw_grid(
    path: str | os.PathLike[str],
    net: Network,
    shape: tuple[int, ...],
    compute: Compute,
    plan: GridPlan,
    options: TrainOptions,
    names: Sequence[str] | None,
    medium: Medium | None,
    *,
    show: bool,
    stopped: Callable[[], bool],
) -> None:
    """Draw samples with a bar of their own, and write the file.

    Args:
        net, shape, compute: what is sampled: a network, the shape of its samples, device and precision.
        names: of the classes; None: their numbers are shown.
        medium: what the samples are, besides images.
        show: show the bar.
        stopped: whether to stop; asked after each step.
    Raises: Interrupted: `stopped` returned True; nothing is written. Diverged: the network returned NaN or infinity.
    """
    from tqdm import tqdm

    steps = grid_steps(options)
    sampler = Sampler(net, options.schedule, shape=shape, device=compute.device, precision=compute.precision)
    bar = tqdm(
        total=steps * plan.samples,
        desc="grid of samples",
        unit="step",
        leave=False,
        disable=not show,
        file=Stderr(),
        dynamic_ncols=True,
    )

    def on_steps(steps: int, samples: int) -> None:
        bar.update(steps * samples)
        if stopped():
            raise Interrupted

    with bar:
        output = "uint8" if len(sampler.shape) == 3 else "float"
        try:
            samples = sampler.sample(
                plan.samples, seed=options.seed, class_labels=plan.labels, steps=steps, output=output, progress=on_steps
            )
        except ValueError as error:
            raise Diverged(str(error)) from error
    if output == "uint8":
        save_samples(samples, path, plan.labels, names)
    else:
        save_sequences(samples, path, medium, plan.labels, names)
