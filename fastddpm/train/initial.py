"""The checkpoint that a run starts from."""

import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastddpm import checkpoints
from fastddpm.core.schedule import Schedule
from fastddpm.train.state import saved_init


class Initial(NamedTuple):
    """A checkpoint to start from.

    Attributes:
        source: the absolute path of its folder, or its hub id.
        config: of its network.
        weights: by name.
        schedule: its noise schedule.
    """

    source: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    schedule: Schedule


def load_initial(init: str | os.PathLike[str], out: Path) -> Initial:
    """Load the checkpoint `init`, for a run in the folder `out`.

    If that run has started from it before, the run's own checkpoint serves as well: `init` may be gone by now.

    Raises: ValueError: neither can be loaded, it is a network of latents, or `init` is the folder to write.
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
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=4)
    return Initial(source, checkpoint.config, checkpoint.parameters, checkpoint.schedule)


def config_for_images(initial: Initial, wanted: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's configuration, for images of another size.

    Args: wanted: a configuration for the images of the run.
    Raises: ValueError: the checkpoint has other channels or classes.
    """
    for name in ("in_channels", "out_channels", "num_class_embeds", "class_embed_type"):
        value, need = initial.config.get(name), wanted.get(name)
        if value != need:
            hint = ""
            if name == "num_class_embeds":
                hint = "leave labels out, or " if need else "give labels (--class-conditional), or "
            raise ValueError(
                f"init is {initial.source}, whose {name} is {value}; these images need {need}: "
                f"{hint}start from another checkpoint, or from none"
            )
    return initial.config | {"sample_size": wanted["sample_size"]}
