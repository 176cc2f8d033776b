"""The buffers of the inputs of a batch of samples: the table, the addresses of the noise, and the conditions.

They are tensors at fixed addresses, which a captured CUDA graph reads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.table import COLUMNS, StepTable
from fastddpm.reference.diffusion import add_noise
from fastddpm.sampling import own_network
from fastddpm.sampling.batch_network import BatchNetwork, OutputError, in_buffer
from fastddpm.sampling.conditions import NOTHING, Conditions
from fastddpm.sampling.model import PreparedModel
from fastddpm.sampling.replay import Network, plain_modes


class SampleBuffers:
    """The inputs of n samples, and the network.

    Attributes:
        network: evaluates the network.
        address: [n, 2] int64: (seed, sample index) of each sample, see `noise.address`.
        bad: [n] int32: the row at which a value first was not finite; -1: all values are finite.
        table: [T] rows; the first S are the loaded ones. Its timesteps are the t of the noise: the timestep, plus
            noise.VISIT for each further visit.
        conditions: what the samples are given, on the device.
    """

    def __init__(self, prepared: PreparedModel, n: int, network: BatchNetwork):
        self.prepared, self.network = prepared, network
        device, T = prepared.device, prepared.num_train_timesteps
        self.address = torch.empty(n, 2, dtype=torch.int64, device=device)
        self.bad = torch.empty(n, dtype=torch.int32, device=device)
        rows = torch.empty(T, len(COLUMNS), dtype=torch.float32, device=device)
        timesteps = torch.zeros_like(network.timesteps)
        self.table = StepTable(rows, rows.new_ones(T), timesteps, clip=False, num_train_timesteps=T)
        self.conditions, self._x_0_fn_takes_index = NOTHING, False

    @contextmanager
    def working(self) -> Iterator[None]:
        """The context in which all methods must be called. The current CUDA stream may differ from call to call."""
        with plain_modes(self.prepared.device), self.network.order.on_current_stream(self._tensors()):
            yield

    @property
    def steps(self) -> int:
        """S, the rows of the loaded table."""
        return len(self._loaded)

    def timestep(self, row: int) -> int:
        """The timestep of a row of the loaded table."""
        return int(self._loaded.timesteps[row])

    def describe_step(self, row: int) -> str:
        """What messages call the step at a row."""
        return f"step {self.steps - row} of {self.steps} (t = {self.timestep(row)})"

    def forget_functions(self) -> None:
        """Drop the reference to the user's x_0_fn."""
        self.conditions = replace(self.conditions, x_0_fn=None)

    def _load_samples(self, table: StepTable, address: Tensor, conditions: Conditions) -> None:
        """Copy the table, the addresses [n, 2], and the conditions of the n samples into the buffers."""
        S = len(table)
        self._loaded = table
        self.table = replace(self.table, clip=table.clip, learned=table.learned)
        self.table.rows[:S].copy_(table.rows)
        self.table.scale[:S].copy_(table.scale)
        self.address.copy_(address)
        self._load_conditions(conditions)

    def _load_conditions(self, given: Conditions) -> None:
        """Copy tensors into the buffers of the last ones if their shapes agree, otherwise into new ones."""
        device = self.prepared.device
        buffers: dict[str, Any] = {}
        for name in ("guidance", "known", "mask", "start", "init", "noising"):
            if (value := getattr(given, name)) is not None:
                held = in_buffer(value, getattr(self.conditions, name), device, value.dtype)
                buffers[name] = held if held.ndim == 1 else layout.channels_last(held)
        self._x_0_fn_takes_index = given.x_0_fn is not None and own_network.takes(given.x_0_fn, own_network.INDEX)
        names = "guide_variance", "resample", "x_0_fn"
        self.conditions = replace(NOTHING, **buffers, **{name: getattr(given, name) for name in names})

    def _addresses_in_graph(self) -> tuple[int | None, ...]:
        """The memory addresses of the conditions that a captured step reads."""
        tensors = (self.conditions.guidance, self.conditions.known, self.conditions.mask)
        return tuple(None if x is None else x.data_ptr() for x in tensors)

    def _starting_states(self) -> Tensor:
        """[n, *shape]: x_T ~ N(0, I) of each sample, or its given starting state."""
        given = self.conditions
        if given.start is not None:
            return given.start
        T = torch.full_like(self.address[:, 0], self.table.num_train_timesteps)
        x_T = ops.normal(self.address, self.prepared.shape, stream=noise.START, t=T)
        if given.init is not None and given.noising is not None:
            x_T = add_noise(given.init, x_T, given.noising)
        return x_T

    def _predict(self, network: Network | None) -> Tensor:
        """The network's output for its input. Raises: ValueError: it has the wrong form; the message names the step."""
        try:
            return self.network.predict(network, outputs=(1,) if self.table.learned is None else (2,))
        except OutputError as error:
            with _disable_current_modes():  # `NoWaiting` would refuse to read the position
                row = int(self.network.positions[0])
            raise ValueError(f"{self.describe_step(row)}: {error}") from error

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.network.tensors()
        yield from (self.address, self.bad, self.table.rows, self.table.scale, self.table.timesteps)
        given = self.conditions
        tensors = given.guidance, given.known, given.mask, given.start, given.init, given.noising
        yield from (x for x in tensors if x is not None)
