"""The coefficients of all steps, tabulated, and how to tell that they are so still."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


class Seen:
    """A tensor as it was, to tell whether it is so still.

    On a CPU its values are compared, so that no change goes unnoticed; on a GPU, where the host would have to wait for
    them, torch's count of changes in place, which knows nothing of those through `.data`.
    """

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor, _version(tensor)
        self.values = tensor.clone() if tensor.device == CPU else None

    def is_(self, tensor: Tensor) -> bool:
        if tensor is not self.tensor or _version(tensor) != self.version:
            return False
        return self.values is None or torch.equal(tensor, self.values)


@dataclass(eq=False)
class Table:
    """The coefficients of every step.

    Attributes:
        key, made_of: what they were computed of.
        rows: [2 + len(alphas_cumprod), 8], in its dtype and on its device: that of timestep t is row t + 1, as
            `reference.diffusion.predict_step` has it; NaN where t is not visited, and in the last.
        visited: the timesteps that have a row.
    """

    key: tuple[Any, ...]
    made_of: list[Seen]
    rows: Tensor
    visited: frozenset[int]
    copies: dict[torch.device, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> Tensor:
        """The rows on a device; on a GPU in float32, which the kernel takes."""
        if device.type == "cpu":
            return self.rows
        if device not in self.copies:
            with torch.inference_mode(False), torch.no_grad():  # else it would be of no use outside of it
                self.copies[device] = send(self.rows.float(), device)
        return self.copies[device]

    def is_of(self, key: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> bool:
        return self.key == key and all(map(Seen.is_, self.made_of, tensors))


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on a device; the host does not wait for a GPU to take it."""
    if isinstance(x, Tensor) and x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _version(x: Tensor) -> int:
    """Tells changes in place; -1 for a tensor of inference mode, where torch does not count them."""
    return -1 if x.is_inference() else x._version
