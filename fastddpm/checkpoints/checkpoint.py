"""What a checkpoint holds, whatever its format."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.checkpoints.medium import Medium
from fastddpm.checkpoints.parameters import load_into
from fastddpm.core.schedule import Schedule
from fastddpm.networks.fused import kind_of


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained model, as it was read.

    Attributes:
        config: options of `UNet2D` or `UNet1D`.
        parameters: by name, on the CPU in the dtype stored.
        schedule: the noise schedule.
        classes: the names of the classes in the order of their labels; None: the checkpoint names none.
        decoder: the folder of the pipeline whose VAE turns the samples, latents, into images; None: samples are images.
        notes: sentences about what was assumed or changed in reading, for the user to see.
        null_label: the last label, which stands for no class, for classifier-free guidance; None: all labels are
            classes.
        timestep_scale: the network is given t times this; None: t itself.
        shape: of one sample, channels first; None: that of the network.
        network: the network itself, if its parameters are loaded already; then config is empty.
        medium: what the samples are, if they are sounds or texts; None: images, or just numbers.
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
    medium: Medium | None = None

    def build(self, device: torch.device) -> nn.Module:
        """The network with its parameters.

        Raises: ValueError: a parameter is missing, unexpected or of the wrong shape.
        """
        if self.network is not None:
            return self.network
        with torch.device("meta"):
            net = kind_of(self.config)(**self.config)
        load_into(net.to_empty(device=device), self.parameters)
        return net.eval()

    def with_notes(self, notes: tuple[str, ...]) -> "Checkpoint":
        """The same checkpoint with more notes, before its own."""
        return replace(self, notes=(*notes, *self.notes))
