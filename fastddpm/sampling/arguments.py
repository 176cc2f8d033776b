"""Checks of the arguments of `Sampler`: an error says what came, what was wanted, and the way out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.core.checks import is_real, is_whole, one_of, shown, whole
from fastddpm.core.schedule import Schedule, elements
from fastddpm.core.table import StepTable
from fastddpm.networks.fused import Network, is_own
from fastddpm.networks.unet1d import UNet1D

MOST_ELEMENTS = 1 << 31  # of a sample


def checked_model(model: Any) -> Any:
    if not callable(model) or isinstance(model, type):
        raise ValueError(f"model is {shown(model)}; want a network, called as model(x_t, t)")
    return model


def checked_schedule(schedule: Any) -> Schedule:
    if schedule is None:
        return Schedule()
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule is a {type(schedule).__name__}; want a Schedule: Schedule.from_config(scheduler.config) "
            "makes one from a diffusers scheduler"
        )
    return schedule


def sample_shape(net: Network, schedule: Schedule | None = None) -> tuple[int, ...]:
    """(C, H, W) or (C, L) of a network's samples, from its configuration; half of the channels may be the variance."""
    size = net.config["sample_size"]
    channels = min(net.in_channels, net.out_channels)
    if schedule is not None and schedule.learns_variance and net.out_channels % 2 == 0:
        channels = net.out_channels // 2
    if isinstance(net, UNet1D):
        return channels, size
    return (channels, *((size, size) if isinstance(size, int) else size))


def checked_shape(shape: Any) -> tuple[int, ...]:
    """The shape of a sample as a tuple of ints."""
    if shape is None:
        raise ValueError("shape is missing; give that of one sample: (C, H, W), (C, L) or (D,)")
    wanted = "want whole numbers > 0: (C, H, W), (C, L) or (D,)"
    try:
        sizes = tuple(shape.tolist() if hasattr(shape, "tolist") else shape)
        sizes = tuple(whole("shape: a size", size, 1, MOST_ELEMENTS) for size in sizes)
    except (ValueError, TypeError, NotImplementedError, RuntimeError):  # the last two: a tensor without values
        sizes = ()
    if not sizes:
        raise ValueError(f"shape is {shown(shape)}; {wanted}")
    count = 1
    for size in sizes:
        count *= size
    if count > MOST_ELEMENTS:
        raise ValueError(f"shape is {shown(sizes)}, which is {count} numbers; want at most {MOST_ELEMENTS}")
    return sizes


def checked_range(given: Any) -> tuple[float, float] | None:
    """The least and the largest value of the data; None: unknown."""
    if given is None:
        return None
    try:
        low, high = given
    except (TypeError, ValueError):
        low = high = None
    if not is_real(low) or not is_real(high) or not low < high:
        raise ValueError(f"value_range is {shown(given)}; want two numbers, the least and the largest of the data")
    return float(low), float(high)


def checked_times(scale: Any, values: Any, T: int) -> Tensor | None:
    """What the network is told for each timestep: [T] or [T, 1] float32; None: the timestep itself."""
    if scale is not None and values is not None:
        raise ValueError("timestep_scale and timestep_values are both given; want one of them")
    if scale is not None:
        if not is_real(scale) or not scale:
            raise ValueError(f"timestep_scale is {shown(scale)}; want a number other than 0, by which t is multiplied")
        return (torch.arange(T, dtype=torch.float64, device="cpu") * float(scale)).float()
    if values is None:
        return None
    try:
        values = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
        times = values.detach().cpu().float()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"timestep_values is {shown(values)}; want {T} numbers") from error
    if times.shape not in ((T,), (T, 1)) or not times.isfinite().all():
        raise ValueError(f"timestep_values are {tuple(times.shape)}; want {T} finite numbers, one for each timestep")
    return times


def frame_rows(timesteps: Any, table: StepTable) -> frozenset[int]:
    """The rows of a table that visit these timesteps."""
    if timesteps is None:
        return frozenset()
    visited = {t: row for row, t in enumerate(table.timesteps.tolist())}
    wanted = elements(timesteps)
    if not wanted:
        raise ValueError("trajectory is empty; want timesteps that the steps visit, or None")
    if unvisited := [t for t in wanted if not is_whole(t) or t not in visited]:
        first = shown(unvisited[0])
        raise ValueError(
            f"trajectory has {first}, which these steps do not visit; want visited timesteps, such as {max(visited)}"
        )
    return frozenset(visited[t] for t in wanted)


def checked_output(output: Any, shape: tuple[int, ...], decoder: object) -> str:
    """Args: decoder: of a pipeline whose samples are latents, or None."""
    one_of("output", output, ("float", "uint8"))
    if output == "uint8" and len(shape) != 3:
        raise ValueError(f"output is 'uint8', but a sample is {shape}, not an image (C, H, W); use 'float'")
    if output == "uint8" and decoder is not None:
        raise ValueError(
            "output is 'uint8', but the samples are latents, which the VAE of the pipeline turns into images; "
            "use 'float', and decode them with fastddpm.diffusers.decode"
        )
    return output


def check_functions(progress: Any, callback: Any) -> None:
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise ValueError(
            f"progress is {shown(progress)}; want True or False, or a function that is called with a number of steps "
            "and the number of samples in their batch"
        )
    if callback is not None and not callable(callback):
        raise ValueError(
            f"callback is {shown(callback)}; want a function, called as callback(step, t, x_0, indices), or None"
        )


def checked_labels(given: Any, count: int, model: Any) -> Tensor | None:
    """One class label per sample: [N] int64, or [N, ...] as an embedding of type "identity" takes them.

    Raises: ValueError: the labels do not have this form, are missing, or this model takes none.
    """
    conditional = is_own(model) and model.class_embedding is not None
    if given is None and not conditional:
        return None
    if not conditional:
        raise ValueError(
            "class_labels were given, but the model is not a class-conditional UNet2D or UNet1D; leave them out"
        )
    if given is None:
        raise ValueError("the model is class-conditional; pass class_labels, one per sample")
    identity = model.config.get("class_embed_type") == "identity"
    classes = getattr(model.class_embedding, "num_embeddings", None) or model.config["num_class_embeds"] or 1 << 31
    want = "numbers, one embedding per sample" if identity else f"whole numbers, 0 <= label < {classes}, one per sample"
    if isinstance(given, Sequence) and len(given) != count:  # a range may be too long to list
        raise ValueError(f"class_labels are ({len(given)},) for {count} samples; want one each")
    try:
        labels = given if isinstance(given, Tensor) else torch.from_numpy(np.array(list(given)))
        numbers = labels.tolist()[:8]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # no values, or such as torch does not have
        raise ValueError(f"class_labels are {shown(given)}; want {want}") from error
    if labels.shape[:1] != (count,):
        raise ValueError(f"class_labels are {tuple(labels.shape)} for {count} samples; want one each")
    if identity:
        return labels
    integers = labels.ndim == 1 and not labels.is_floating_point() and labels.dtype != torch.bool
    if count and (not integers or not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise ValueError(f"class_labels are {shown(numbers)}; want {want}")
    return labels.long()
