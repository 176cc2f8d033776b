"""What a checkpoint holds, whatever its format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastddpm.core.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained model, as it was read.

    Attributes:
        config: options of `UNet2D`.
        parameters: by name, on the CPU in the dtype stored.
        schedule: the noise schedule.
        classes: the names of the classes in the order of their labels; None: the checkpoint names none.
        decoder: the folder of the pipeline whose VAE turns the samples, latents, into images; None: samples are images.
        notes: sentences about what was assumed or changed in reading, for the user to see.
        null_label: the last label, which stands for no class, for classifier-free guidance; None: all labels are
            classes.
    """

    config: dict[str, Any]
    parameters: dict[str, Tensor]
    schedule: Schedule
    classes: tuple[str, ...] | None = None
    decoder: Path | None = None
    notes: tuple[str, ...] = ()
    null_label: int | None = None
