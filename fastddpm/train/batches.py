"""The batch of a training step: samples, timesteps, noise addresses and labels. It depends on the seed and the step."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastddpm.core import noise
from fastddpm.core.checks import shown
from fastddpm.core.layout import channels_last
from fastddpm.core.memory import send
from fastddpm.core.schedule import Schedule
from fastddpm.processes.distributed import Ranks
from fastddpm.storage import images
from fastddpm.storage.audio import FULL_SCALE
from fastddpm.train.options import TrainOptions

WANTED = "uint8 [N, H, W, C] with at least one image and C = 1, 3 or 4, or sequences, float32 or int16 [N, C, L]"


class Draws(NamedTuple):
    """The random numbers of a step, for a batch of N.

    Attributes:
        image: [N] int64: the position of each image in the data set.
        t: [N] int64: their timesteps, 0 <= t < T.
        mirrored: [N] int64: 1 where an image is mirrored, if the run flips images.
        address: [N, 2] int64: (seed, sample index) of the noise; the sample index is the running number of the example.
    """

    image: Tensor
    t: Tensor
    mirrored: Tensor
    address: Tensor


class Batch(NamedTuple):
    """One rank's share of the batch of a step, on its device.

    Attributes:
        x_0: [N, C, H, W] uint8 or [N, C, L] float32, channels-last.
        t: [N] int64: timesteps.
        address: [N, 2] int64: addresses of the noise.
        labels: [N] int64, or None.
    """

    x_0: Tensor
    t: Tensor
    address: Tensor
    labels: Tensor | None


class Batches:
    """Gives this rank's share of the batch of each step.

    Args:
        data: images, [N, H, W, C] uint8; or sequences, [N, C, L] float32 or int16.
        labels: [N] integers, or None.
        null_label: the label that replaces dropped ones; None: the network has none.
        options: of the run.
        group: the processes that share each batch.
        device: of this rank.
    """

    def __init__(
        self,
        data: np.ndarray,
        labels: np.ndarray | None,
        null_label: int | None,
        options: TrainOptions,
        group: Ranks,
        device: torch.device,
    ):
        self.options = options
        self.null_label = null_label
        self.group = group
        self.device = device
        x = torch.from_numpy(data)
        self.data = on_device(channels_last(x.movedim(-1, 1) if x.ndim == 4 else x), device)
        self.labels = None if labels is None else torch.from_numpy(np.ascontiguousarray(labels, np.int64))

    def of_step(self, k: int) -> Batch:
        """This rank's share of the batch of step k."""
        share = self.group.share(self.options.batch_size)
        index, t, mirrored, address = (drawn[share] for drawn in draws(k, len(self.data), self.options))
        labels = [] if self.labels is None else [self._labels(k, index, share)]
        x_0 = self.data[index if self.data.device.type == "cpu" else send(index, self.device)]
        x_0 = send(x_0, self.device)
        if x_0.dtype == torch.int16:
            x_0 = x_0.float() / FULL_SCALE
        numbers = send(torch.stack([t, mirrored, *address.T, *labels]), self.device)  # in one copy
        t, mirrored, seed, sample, *labels = numbers.unbind()
        if self.options.flip:
            x_0 = torch.where(mirrored.bool()[:, None, None, None], x_0.flip(-1), x_0)
        return Batch(channels_last(x_0), t, torch.stack([seed, sample], 1), labels[0] if labels else None)

    def at_0(self, k: int) -> Tensor | None:
        """[M] int64: the entries of this rank's share of step k with t = 0; None: the variance is not learned.

        The host knows them, so that nothing waits for a GPU.
        """
        if not self.options.schedule.learns_variance:
            return None
        t = draws(k, len(self.data), self.options).t[self.group.share(self.options.batch_size)]
        found = (t == 0).nonzero()[:, 0]
        return send(found, self.device) if len(found) else found.to(self.device)  # an empty tensor is not pinned

    def _labels(self, k: int, index: Tensor, share: slice) -> Tensor:
        """The labels of the images at index, [N] int64, some of which are dropped."""
        assert self.labels is not None
        labels = self.labels[index]
        if not self.options.label_dropout or self.null_label is None:
            return labels
        return labels.masked_fill(dropped(k, self.options)[share], self.null_label)


def dropped(k: int, options: TrainOptions) -> Tensor:
    """Which labels of step k are dropped: [batch_size] bool, a function of the seed, k and the batch size."""
    generator = np.random.default_rng((options.seed, 3, k))  # of its own: `draws` gives the same with and without it
    return torch.from_numpy(generator.random(options.batch_size) < options.label_dropout)


def draws(k: int, total: int, options: TrainOptions) -> Draws:
    """The random numbers of step k, for a data set of `total` images: a function of the seed, k and the batch size.

    Every epoch visits each image once, in a new order.
    """
    size = options.batch_size
    examples = np.arange(k * size, (k + 1) * size)
    epoch, place = np.divmod(examples, total)
    index = np.empty(size, np.int64)
    for e in np.unique(epoch).tolist():
        index[epoch == e] = _epoch_order(options.seed, e, total)[place[epoch == e]]
    generator = np.random.default_rng((options.seed, 1, k))
    t = generator.integers(options.schedule.num_train_timesteps, size=size)
    mirrored = (generator.random(size) < 0.5).astype(np.int64)
    return Draws(
        torch.from_numpy(index),
        torch.from_numpy(t),
        torch.from_numpy(mirrored),
        noise.address(options.seed, torch.from_numpy(examples)),
    )


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, total: int) -> np.ndarray:
    """[total] int64: the images in the order in which an epoch visits them."""
    return np.random.default_rng((seed, 0, epoch)).permutation(total)


def on_device(data: Tensor, device: torch.device) -> Tensor:
    """The data on the device, or on the host if they would take more than half of the free memory of a GPU."""
    if device.type == "cuda" and data.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return data
    return data.to(device)


def check_data(data: np.ndarray, schedule: Schedule) -> tuple[int, ...]:
    """The shape of a sample, channels first: (C, H, W) or (C, L).

    Raises: ValueError: data is neither uint8 [N, H, W, C] nor finite float32 or int16 [N, C, L], or beyond the range to
        which the schedule clips x_0.
    """
    if not isinstance(data, np.ndarray):
        kind = f"{type(data).__module__}.{type(data).__qualname__}".removeprefix("builtins.")
        raise ValueError(f"data is a {kind}; want a numpy array, {WANTED}")
    if data.ndim == 3 and data.dtype in (np.float32, np.int16) and data.size:
        if not np.isfinite(data).all():
            raise ValueError(f"data is {data.dtype} {data.shape} with NaN or infinity; want finite numbers")
        largest, limit = max(-float(data.min()), float(data.max())), schedule.clip_sample_range
        if data.dtype == np.float32 and schedule.clip_sample and largest > limit:
            raise ValueError(
                f"data reaches {largest:g}, but the schedule clips x_0 to [-{limit:g}, {limit:g}]; scale the data, or "
                "set clip_sample to False"
            )
        return data.shape[1:]
    if data.dtype != np.uint8 or data.ndim != 4 or not len(data) or data.shape[3] not in images.CHANNELS:
        raise ValueError(f"data is {data.dtype} {data.shape}; want {WANTED}")
    return (data.shape[3], *data.shape[1:3])


def check_labels(labels: np.ndarray | None, data: np.ndarray) -> int | None:
    """The number of classes; None without labels. Raises: ValueError: labels are not one class for each image."""
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != data.shape[:1]:
        what = f"labels are {labels.dtype} {labels.shape}"
        raise ValueError(f"{what}; want one whole number for each of the {len(data)} samples")
    classes = np.unique(labels)
    if classes[0] != 0 or classes[-1] != len(classes) - 1:
        values = f"{len(classes)} distinct value{'s' * (len(classes) != 1)}"
        what = f"labels have {values}, from {classes[0]} to {classes[-1]}"
        way_out = "np.unique(labels, return_inverse=True)[1] renumbers them"
        raise ValueError(f"{what}; want classes 0, 1, ... without gaps: {way_out}")
    return len(classes)


def check_classes(names: Sequence[str] | None, count: int | None) -> tuple[str, ...] | None:
    """The names of the classes. Raises: ValueError: they are not one distinct name for each of `count` classes."""
    if names is None:
        return None
    if count is None:
        raise ValueError(f"classes are {shown(names)}, but there are no labels; give both, or neither")
    distinct = not isinstance(names, str) and isinstance(names, Sequence) and all(isinstance(n, str) for n in names)
    if not distinct or not len(names) == len(set(names)) == count:
        raise ValueError(f"classes are {shown(names)}; want {count} distinct names, one for each class")
    return tuple(names)


def check_sides(shape: tuple[int, ...], levels: int, frame: int) -> None:
    """Raises: ValueError: a U-Net of so many levels cannot halve the sides. Args: shape: of a sample."""
    factor = 1 << (levels - 1)
    if len(shape) == 2:
        if shape[1] % (frame * factor):
            raise ValueError(
                f"sequences have the length {shape[1]}; with {levels} levels and frames of {frame} it must be a "
                f"multiple of {frame * factor}: pad or cut them, or use fewer levels (channels) or another frame"
            )
        return
    height, width = shape[1:]
    if not height or not width or height % factor or width % factor:
        raise ValueError(
            f"images are {height} x {width}; with {levels} levels both sides must be multiples of "
            f"{factor}: crop or resize them, or use fewer levels (channels)"
        )
