"""The checkpoint that a run starts from."""

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastddpm import checkpoints
from fastddpm.checkpoints.medium import Medium
from fastddpm.core.checks import shown
from fastddpm.core.schedule import Schedule
from fastddpm.networks.fused import kind_of
from fastddpm.train.batches import check_sides
from fastddpm.train.options import TrainOptions
from fastddpm.train.state import saved_init

# of the class embeddings that a trained network gets: about that of its time embeddings; measured in bench/NOTES.md
CLASS_EMBEDDING_STD = 0.3


class Initial(NamedTuple):
    """A checkpoint to start from.

    Attributes:
        source: the absolute path of its folder, or its hub id.
        config: of its network.
        weights: by name.
        schedule: its noise schedule.
        classes: the names of its classes; None: it has none, or does not name them.
        null_label: the label that stands for no class; None: there is none.
        medium: what its samples are; None: images, or just numbers.
    """

    source: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    schedule: Schedule
    classes: tuple[str, ...] | None
    null_label: int | None
    medium: Medium | None = None


def load_initial(init: str | os.PathLike[str], out: Path) -> Initial:
    """Load the checkpoint `init`, for a run in the folder `out`.

    If that run has started from it before, the run's own checkpoint serves as well: `init` may be gone by now.

    Raises: ValueError: neither can be loaded, it is a network of latents, its weights are not finite, or `init` is the
        folder to write.
    """
    init, path = os.fspath(init), os.path.abspath(init)
    for place in (out, out / "unet"):
        if os.path.isdir(path) and os.path.isdir(place) and os.path.samefile(path, place):
            raise ValueError(f"init is {init}, which is the folder that the run writes, {place}; write to another one")
    before = saved_init(out)
    source = path if os.path.isdir(path) or path == before else init
    if source == before:
        with suppress(ValueError):
            return _loaded(source, out)
    return _loaded(source, source)


def _loaded(source: str, place: str | Path) -> Initial:
    checkpoint = checkpoints.load(place)
    if checkpoint.decoder is not None:
        raise ValueError(f"init is {source}, whose network draws latents, not images; start from another checkpoint")
    if checkpoint.network is not None:
        raise ValueError(
            f"init is {source}, whose network is not a UNet2D or UNet1D of its own; start from another one"
        )
    if checkpoint.timestep_scale is not None:
        raise ValueError(
            f"init is {source}, whose network is given t times {checkpoint.timestep_scale:g}, which training does not "
            "do; start from another checkpoint"
        )
    if not all(weights.isfinite().all() for weights in checkpoint.parameters.values()):
        raise ValueError(f"init is {source}, whose weights are not finite; start from another checkpoint")
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=4)
    return Initial(
        source,
        checkpoint.config,
        checkpoint.parameters,
        checkpoint.schedule,
        checkpoint.classes,
        checkpoint.null_label,
        checkpoint.medium,
    )


def network_of_run(
    options: TrainOptions,
    shape: tuple[int, ...],
    medium: Medium | None,
    initial: Initial | None,
    count: int | None,
    null_label: int | None,
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """(the configuration of a run's network, the weights that it starts from or None).

    Args:
        shape: of a sample, channels first.
        medium: what the samples are.
        count: classes without the null label; None: there are no labels.
    Raises: ValueError: the options, the checkpoint and the data do not go together.
    """
    if initial is not None and initial.medium != medium:
        raise ValueError(f"init is {initial.source}, whose samples are {initial.medium}, but these are {medium}")
    config = options.unet_config(shape, count if count is None or null_label is None else count + 1)
    weights = None
    if initial is not None:
        initial = _with_embeddings(initial, count, null_label, options.seed)
        config, weights = _config_for(initial, config), initial.weights
    levels = len(config["down_dims" if len(shape) == 2 else "block_out_channels"])
    check_sides(shape, levels, config.get("frame", 1))
    return config, weights


def numbered_as(
    initial: Initial, labels: np.ndarray, count: int | None, names: Sequence[str] | None
) -> tuple[np.ndarray, int | None, tuple[str, ...] | None]:
    """The labels of data as the checkpoint numbers its classes, if the classes have names.

    Args: labels: [N] integers, 0 <= label < count; names: of these classes.
    Returns: [N] labels, the number of classes and their names.
    Raises: ValueError: a class of the data is none of the checkpoint's.
    Warns: the checkpoint does not name its classes, and an older version would have numbered these otherwise.
    """
    if names is None:
        return labels, count, initial.classes
    if initial.classes is None:
        if initial.config.get("num_class_embeds") and list(names) != sorted(names):
            warnings.warn(
                f"init is {initial.source}, which does not name its classes; they are taken to be 0, 1, ... in the "
                f"order {shown(list(names))}, but an older fastddpm would have trained it with {shown(sorted(names))}",
                stacklevel=3,
            )
        return labels, count, tuple(names)
    if unknown := [name for name in names if name not in initial.classes]:
        raise ValueError(
            f"init is {initial.source}, whose classes are {shown(list(initial.classes))}; the images have another, "
            f"{shown(unknown[0])}: leave it out, rename it, or start from another checkpoint"
        )
    number = np.array([initial.classes.index(name) for name in names])
    return number[np.asarray(labels)], len(initial.classes), initial.classes


def null_label(options: TrainOptions, initial: Initial | None, count: int | None) -> int | None:
    """The null label of a run, which follows its classes: it has one if labels are dropped, or its checkpoint has one.

    Args: count: classes without the null label; None: there are no labels.
    Raises: ValueError: labels are to be dropped, but there are none.
    """
    if options.label_dropout and count is None:
        raise ValueError(
            f"label_dropout is {options.label_dropout:g}, but there are no labels; give labels (--class-conditional), "
            "or leave it out"
        )
    held = initial is not None and initial.null_label is not None
    return count if options.label_dropout or held else None


def _with_embeddings(initial: Initial, count: int | None, null_label: int | None, seed: int) -> Initial:
    """The checkpoint with embeddings of the classes or the null label that it lacks.

    That of the null label is zero: without a class, the network first computes what it did before. Those of the
    classes are random, since from zeros they hardly learn.

    Args: count: classes without the null label; None: there are no labels. seed: of the random embeddings.
    Raises: ValueError: the checkpoint has another number of classes.
    """
    if count is None or initial.config.get("class_embed_type") is not None:
        return initial  # if it does not fit, `_config_for` refuses it
    held, want = initial.config.get("num_class_embeds"), count + (null_label is not None)
    if held is not None and (classes := held - (initial.null_label is not None)) != count:
        raise ValueError(
            f"init is {initial.source}, which has {classes} classes, but these images have {count}; start from another "
            "checkpoint, or from none"
        )
    like = initial.weights.get("time_embedding.linear_2.bias")
    rows = initial.weights.get("class_embedding.weight")
    if held == want or like is None or (held and (rows is None or rows.shape != (held, *like.shape))):
        return initial  # if its weights are not those of its configuration, loading them says so
    if not held or rows is None:
        random = torch.Generator().manual_seed(seed)
        rows = like.new_zeros(count, len(like)).normal_(0, CLASS_EMBEDDING_STD, generator=random)
    rows = torch.cat([rows, like.new_zeros(want - len(rows), len(like))])
    config = initial.config | {"num_class_embeds": want}
    return initial._replace(config=config, weights=initial.weights | {"class_embedding.weight": rows})


def _config_for(initial: Initial, wanted: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's configuration, for samples of another size.

    Args: wanted: a configuration for the samples of the run.
    Raises: ValueError: the checkpoint is for samples of another kind, or has other channels or classes.
    """
    if (kind := kind_of(initial.config)) is not (wanted_kind := kind_of(wanted)):
        raise ValueError(
            f"init is {initial.source}, a {kind.__name__}, but these samples need a {wanted_kind.__name__}; start from "
            "another checkpoint, or from none"
        )
    for name in ("in_channels", "out_channels", "input_dim", "num_class_embeds", "class_embed_type"):
        value, need = initial.config.get(name), wanted.get(name)
        if value != need:
            hint = "give labels (--class-conditional), or " if name == "num_class_embeds" and need is None else ""
            raise ValueError(
                f"init is {initial.source}, whose {name} is {value}; these images need {need}: "
                f"{hint}start from another checkpoint, or from none"
            )
    return initial.config | {"sample_size": wanted["sample_size"]}
