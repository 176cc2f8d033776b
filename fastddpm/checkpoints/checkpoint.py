"""What a checkpoint holds, whatever its format."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

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
        timestep_scale: the network is given t times this; None: t itself.
        shape: of one sample, channels first; None: that of the network.
        network: the network itself, if it is no `UNet2D`; then config is empty.
    """

    config: dict[str, Any]
    parameters: dict[str, Tensor]
    schedule: Schedule
    classes: tuple[str, ...] | None = None
    decoder: Path | None = None
    notes: tuple[str, ...] = ()
    null_label: int | None = None
    timestep_scale: float | None = None
    shape: tuple[int, ...] | None = None
    network: nn.Module | None = None

    def with_notes(self, notes: tuple[str, ...]) -> "Checkpoint":
        """The same checkpoint with more notes, before its own."""
        return replace(self, notes=(*notes, *self.notes))
