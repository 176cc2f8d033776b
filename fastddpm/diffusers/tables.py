"""The tables of all steps' coefficients, and snapshots that tell when a table is out of date."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddpm.core.memory import send

CPU = torch.device("cpu")


class Snapshot:
    """A tensor as it was, to detect later changes.

    On a CPU the values are compared, so every change is detected. On a GPU that would make the host wait, so torch's
    count of in-place changes is compared; it does not include changes made through `.data`.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.version = _version(tensor)
        self.values = tensor.clone() if tensor.device == CPU else None

    def matches(self, tensor: Tensor) -> bool:
        """Whether this is the same tensor, unchanged."""
        if tensor is not self.tensor or _version(tensor) != self.version:
            return False
        return self.values is None or torch.equal(tensor, self.values)


class Columns(NamedTuple):
    """The columns of a table, in the order of `reference.diffusion.predict_step`: one value for each timestep."""

    signal: Tensor  # sqrt(abar_t)
    noise: Tensor  # sqrt(1 - abar_t)
    of_x_0: Tensor  # coefficients of the mean
    of_w: Tensor
    sigma: Tensor
    log_min: Tensor  # bounds of the log variance, for learned_range
    log_max: Tensor
    noisy: Tensor  # 0: the step adds no noise


@dataclass(eq=False)
class Table:
    """The coefficients of every step.

    Attributes:
        key, sources: the settings and the tensors they were computed from.
        rows: [2 + len(alphas_cumprod), 8], in its dtype and on its device: row t + 1 holds the `Columns` of timestep t;
            NaN where t is not visited, and in the last row.
        visited: the timesteps that have a row.
    """

    key: tuple[Any, ...]
    sources: list[Snapshot]
    rows: Tensor
    visited: frozenset[int]
    copies: dict[torch.device, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, key: tuple[Any, ...], sources: tuple[Tensor, ...], timesteps: list[int], columns: Columns) -> "Table":
        """Build a table.

        Args:
            sources: alphas_cumprod first.
            timesteps: those that the columns are of.
        """
        abar = sources[0]
        rows = torch.full((2 + len(abar), len(Columns._fields)), torch.nan, dtype=abar.dtype, device=abar.device)
        rows[send(torch.tensor(timesteps, dtype=torch.int64, device="cpu"), abar.device) + 1] = torch.stack(columns, 1)
        return cls(key, list(map(Snapshot, sources)), rows, frozenset(timesteps))

    def on(self, device: torch.device) -> Tensor:
        """The rows on a device; on a GPU in float32, as the kernel needs them."""
        if device.type == "cpu":
            return self.rows
        if device not in self.copies:
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor would be useless outside that mode
                self.copies[device] = send(self.rows.float(), device)
        return self.copies[device]

    def is_current(self, key: tuple[Any, ...], sources: tuple[Tensor, ...]) -> bool:
        """Whether it was computed from these settings, and these tensors as they are now."""
        return self.key == key and all(map(Snapshot.matches, self.sources, sources))


def _version(x: Tensor) -> int:
    """torch's count of in-place changes; -1 for an inference tensor, for which there is none."""
    return -1 if x.is_inference() else x._version
