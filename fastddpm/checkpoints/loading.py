"""Loads a checkpoint of any format: finds or downloads it, recognises its format and calls that format's module."""

import os
from pathlib import Path

from fastddpm.checkpoints import diffusers
from fastddpm.checkpoints.checkpoint import Checkpoint
from fastddpm.checkpoints.shipped import SHIPPED_MODEL, shipped_model
from fastddpm.core.checks import checked_call, shown
from fastddpm.core.schedule import Schedule


@checked_call
def load(source: str | os.PathLike[str], *, variant: str | None = None, schedule: Schedule | None = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
        source: a folder; or "fashion-mnist", the bundled model; or the id of a model on the Hugging Face hub
            ("google/ddpm-cifar10-32"), which is downloaded once.
        variant: the variant of the weights, such as "fp16" for diffusion_pytorch_model.fp16.safetensors.
        schedule: use this one and not that of the checkpoint, which then needs none.
    Raises: ValueError: there is no checkpoint, or one of its files is missing, damaged or for another class.
    """
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    if not path or not isinstance(path, str):
        raise ValueError(f"the checkpoint is {shown(source)}; {diffusers.WANTED}")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ValueError(f"schedule is a {type(schedule).__name__}; want a Schedule, or None for the checkpoint's")
    folder = Path(path)
    if not os.path.isdir(path):
        folder = shipped_model() if path == SHIPPED_MODEL else diffusers.download(path, variant)
    return diffusers.read(folder, variant, schedule)  # the only format so far; its errors name the files it looked for
