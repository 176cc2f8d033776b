"""Loads a checkpoint of any format: finds or downloads it, recognises its format and calls that format's module."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from fastddpm.checkpoints import diffusers
from fastddpm.core.schedule import Schedule


def load(
    source: str | os.PathLike[str], *, variant: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], Schedule]:
    """Read a checkpoint.

    Args:
        source: a folder, or the id of a model on the Hugging Face hub ("google/ddpm-cifar10-32"), which is downloaded
            once.
        variant: the variant of the weights, such as "fp16" for diffusion_pytorch_model.fp16.safetensors.
    Returns: (options of `UNet2D`, parameters by name on the CPU in the dtype stored, schedule).
    Raises: ValueError: there is no checkpoint, or one of its files is missing, damaged or for another class.
    """
    if not os.fspath(source):
        raise ValueError("the checkpoint is ''; want a folder, or a hub id such as google/ddpm-cifar10-32")
    folder = Path(source)
    if not folder.is_dir():
        folder = diffusers.download(os.fspath(source), variant)
    return diffusers.read(folder, variant)  # the only format so far; its errors name the files that it looked for
