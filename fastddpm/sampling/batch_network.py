"""The network with the buffers of a batch.

Everything that a call reads is in tensors at fixed addresses. So one captured CUDA graph serves every timestep.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastddpm import ops
from fastddpm.core import layout
from fastddpm.core.precision import arithmetic
from fastddpm.networks.fused import LABELS, Fused
from fastddpm.networks.fused_unet1d import FusedUNet1D
from fastddpm.networks.unet2d import UNet2D
from fastddpm.sampling import own_network
from fastddpm.sampling.capture import StreamOrder
from fastddpm.sampling.conditions import NOTHING, Conditions, InputForm
from fastddpm.sampling.model import PreparedModel
from fastddpm.sampling.replay import Network, Replay, plain_modes, torch_settings


class OutputError(ValueError):
    """The network's output does not have the type, shape or device that its input requires."""


class BatchNetwork:
    """The network with its buffers for batches of n.

    Args: per_entry: whether the entries of a batch may be at different timesteps.
    Attributes:
        entries: of a batch of the network: n, or 2n with guidance, the second half without the condition.
        input: [entries, channels, *spatial], channels-last: what the network reads, in the precision of a fused one;
            any other network is handed copies of these float32 states, see `own_network`.
        timesteps: [T] int32; the first S are the loaded ones.
        positions: [n] int32: which of the timesteps each entry is at.
        kwargs: the arguments that were loaded, besides x and t; tensors are [entries, ...].
        replay: runs the work of the batch: calls of the network, or the steps of the `Runner` that has this network.
        order: orders this work across streams.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        n: int,
        *,
        capture: bool,
        form: InputForm = NOTHING.form,
        per_entry: bool = False,
    ):
        self.prepared, self.form = prepared, form
        device, T, net = prepared.device, prepared.num_train_timesteps, prepared.net
        dtype = torch.float32 if net is None else prepared.dtype
        channels, *spatial = prepared.shape
        self.entries = 2 * n if form.guided else n
        self.input = layout.empty(self.entries, (channels + form.concat, *spatial), dtype=dtype, device=device)
        twice = self.input.unflatten(0, (self.entries // n if n else 1, n))  # with guidance
        self._states, self._concat = twice.narrow(2, 0, channels), twice.narrow(2, channels, form.concat)
        self.timesteps = torch.zeros(T, dtype=torch.int32, device=device)
        self._t = prepared.t_of(self.timesteps)  # what the network is told
        self.positions = torch.empty(n, dtype=torch.int32, device=device)
        self.kwargs: dict[str, Any] = {}
        self._time_rows: Tensor | None = None  # [T, columns] of a fused network
        self._condition_rows: Tensor | None = None  # [entries, columns] of a fused `UNet1D`
        self._output: Tensor | None = None
        self._may_share_position = self._one_position = False
        self._is_first = True  # call of the network since `load`
        if net is not None:
            kernels = ops.backend(device) != "torch"
            columns = cast(nn.Linear, net.projection).out_features
            rows_dtype = torch.float32 if kernels else prepared.dtype
            self._time_rows = torch.empty(T, columns, dtype=rows_dtype, device=device)
            # without kernels the one row of a batch becomes a bias of convolutions
            self._one_position = self._may_share_position = not kernels and not per_entry
        self.replay = Replay(prepared, n, capture=capture)
        self.order = StreamOrder(device)

    @property
    def labels(self) -> Tensor | None:
        """[entries, ...]: the class labels of a network of our own that were loaded, or None."""
        return self.kwargs.get(LABELS)

    @contextmanager
    def working(self) -> Iterator[None]:
        """The context in which calls must be made. The current CUDA stream may differ from call to call."""
        with plain_modes(self.prepared.device), self.order.on_current_stream(self.tensors()):
            yield

    def tensors(self) -> Iterator[Tensor]:
        """Everything that a call reads and writes on the device."""
        buffers = self.input, self.timesteps, self._t, self.positions, self._time_rows, self._condition_rows
        yield from (buffer for buffer in (*buffers, self._output) if buffer is not None)
        yield from (leaf for leaf in tree_leaves(self.kwargs) if isinstance(leaf, Tensor))
        yield from self.prepared.weights()

    def prepare(
        self, timesteps: Tensor, given: Mapping[str, Tensor] = MappingProxyType({}), *, per_entry: bool = False
    ) -> None:
        """Get ready for calls at some timesteps.

        Args:
            timesteps: [S] integers, on any device.
            given: the network's arguments besides x and t: tensors [n, ...] by name.
            per_entry: whether the entries of a batch will be at different timesteps.
        """
        if self.prepared.net is not None:
            self._one_position = self._may_share_position and not per_entry
        with self.working():
            self.load(timesteps, Conditions(given))
            self.replay.prepare(self._predict_into_output, self._reset, self.constants())

    def __call__(self, x: Tensor, position: int | Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            x: [n, *shape], floating point.
            position: which of the prepared timesteps: one for all entries, or [n] integers on x's device if they were
                prepared per entry.
        Returns: a new tensor in the network's precision, channels-last.
        Raises: OutputError: the network returned something else than one or two values for each element of x.
        """
        self.input.copy_(x)
        if isinstance(position, Tensor):
            self.positions.copy_(position)
        else:
            self.positions.fill_(position)
        self.replay(self._predict_into_output)
        output = cast(Tensor, self._output)
        return output if self.replay.graph is None else output.clone()

    def load(self, timesteps: Tensor, conditions: Conditions, samples: Tensor | None = None) -> None:
        """Copy timesteps and what the samples are given into the buffers; see `prepare`.

        Args: conditions: of n samples, of this form; samples: [n] int64: their indices, for a network that takes them.
        """
        S = len(timesteps)
        self._is_first = True
        self.timesteps[:S].copy_(timesteps)
        self._t[:S].copy_(self.prepared.t_of(self.timesteps[:S]))
        kwargs = dict(conditions.kwargs)
        if self.prepared.takes_index and samples is not None:
            kwargs[own_network.INDEX] = samples
        if self.form.guided:
            without = {**kwargs, **conditions.uncond}
            kwargs = {name: tree_map(_joined, value, without[name]) for name, value in kwargs.items()}
        self._load_kwargs(kwargs)
        if conditions.concat is not None:
            self._concat.copy_(conditions.concat)
        if self.prepared.net is not None:
            self._load_rows(self.prepared.net, S)

    def _load_rows(self, net: Fused, S: int) -> None:
        """Compute what depends on t alone, for the first S timesteps, and what depends on the condition alone."""
        rows = cast(Tensor, self._time_rows)
        with arithmetic("fp32", self.prepared.device):
            if isinstance(net, FusedUNet1D):
                of_condition = net.condition_rows(**self.kwargs)
                if of_condition is not None:
                    buffer = self._condition_rows
                    self._condition_rows = in_buffer(of_condition, buffer, self.prepared.device, rows.dtype)
            if self._table_of_time:
                rows[:S] = net.time_rows(self._t[:S])

    @property
    def _table_of_time(self) -> bool:
        """Whether the rows of time are a table: the labels of a `UNet2D` are added to t within the embedding."""
        return self.labels is None or isinstance(self.prepared.net, FusedUNet1D)

    def read_labels(self, labels: Tensor) -> None:
        """Copy other class labels [entries, ...] into the buffer that was loaded, and what depends on them."""
        cast(Tensor, self.labels).copy_(labels)
        net = self.prepared.net
        if isinstance(net, FusedUNet1D):
            with arithmetic("fp32", self.prepared.device):
                cast(Tensor, self._condition_rows).copy_(cast(Tensor, net.condition_rows(**self.kwargs)))

    def read_states(self, x: Tensor) -> None:
        """Copy states [n, *shape] into the input."""
        self._states.copy_(x)

    def predict(self, network: Network | None = None, *, outputs: tuple[int, ...] = (1,)) -> Tensor:
        """Evaluate the network on the buffers.

        Args:
            network: what to call; None: the model's `forward`.
            outputs: how many values it may return for each element of a state.
        Returns: the model's output, [entries, ...], channels-last.
        Raises: OutputError: it is something else.
        """
        prepared = self.prepared
        network = cast(Network, prepared.forward) if network is None else network
        with prepared.compute.arithmetic():
            if prepared.net is not None:
                with arithmetic("fp32", prepared.device):
                    columns = self._columns()
                model_output = network(self.input, columns)
            else:
                with own_network.noticing_random_numbers(prepared.device) if self._is_first else nullcontext():
                    model_output = own_network.call(
                        network,
                        self.input,
                        self._t_of_entries(),
                        prepared.compute,
                        dtype=prepared.own_dtype,
                        memory_format=prepared.memory_format,
                        kwargs=self.kwargs,
                    )
                self._is_first = False
        channels, *spatial = prepared.shape
        shapes = [(self.entries, channels * values, *spatial) for values in outputs]
        dense = isinstance(model_output, Tensor) and model_output.layout == torch.strided and not model_output.is_nested
        like_state = dense and model_output.shape in shapes and model_output.device == self.input.device
        if not like_state or not model_output.is_floating_point():
            numbers = "one floating-point number" if min(outputs) == 1 else "two floating-point numbers"
            raise OutputError(
                f"the network returned {_described(model_output)} for {_described(self.input)}; want a dense tensor "
                f"with {numbers} per element{' of x_t' * bool(self.form.concat)}: by itself, as `.sample`, or first in "
                "a tuple"
            )
        output = model_output if model_output.dtype in ops.FLOATS else model_output.float()
        return output if layout.is_channels_last(output) else layout.channels_last(output)

    def constants(self) -> object:
        """What a captured graph fixes but the next batch may change: addresses, and torch's settings."""
        model = self.prepared.model
        weights: tuple[Tensor, ...] = ()
        if isinstance(model, nn.Module) and self.prepared.compiles:
            weights = (*model.parameters(), *model.buffers())
        leaves, spec = tree_flatten(self.kwargs)
        return (
            self._one_position,
            ([_place(leaf) for leaf in (*leaves, self._condition_rows)], spec),
            () if self.prepared.net is not None else tuple(weight.data_ptr() for weight in weights),
            torch_settings(),
        )

    def _load_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Copy the arguments into the buffers of the last ones if their shapes agree, otherwise into new ones."""
        leaves, spec = tree_flatten(kwargs)
        old, old_spec = tree_flatten(self.kwargs)
        new = []
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                new.append(leaf)
                continue
            floats = self.prepared.own_dtype or torch.float32
            dtype = floats if leaf.is_floating_point() else torch.int64 if self.prepared.net is not None else leaf.dtype
            new.append(in_buffer(leaf, old[i] if spec == old_spec else None, self.prepared.device, dtype))
        self.kwargs = tree_unflatten(new, spec)

    def _t_of_entries(self) -> Tensor:
        """[entries] or [entries, 1]: what the network is told of the time."""
        t = self._t.index_select(0, self.positions)
        if t.is_floating_point() and self.prepared.own_dtype is not None:
            t = t.to(self.prepared.own_dtype)  # which a linear layer of the network would want
        return torch.cat([t, t]) if self.form.guided else t

    def _columns(self) -> Tensor:
        """[1 or entries, columns]: everything in the network that depends on t and the condition alone."""
        rows = cast(Tensor, self._time_rows)
        if not self._table_of_time:
            return cast(UNet2D, self.prepared.net).time_rows(self._t_of_entries(), self.labels).to(rows.dtype)
        if self._one_position:
            rows = rows.index_select(0, self.positions[:1])
        else:
            rows = rows.index_select(0, self.positions)
            rows = torch.cat([rows, rows]) if self.form.guided else rows
        return rows if self._condition_rows is None else rows + self._condition_rows

    def _predict_into_output(self, network: Network | None) -> None:
        self._output = self.predict(network, outputs=(1, 2))  # twice the channels: a learned variance too

    def _reset(self) -> None:
        self.input.zero_()
        self.positions.zero_()


def in_buffer(value: Tensor, buffer: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy a tensor into a buffer of its shape and this dtype, otherwise into a new one. Returns: the buffer."""
    if isinstance(buffer, Tensor) and (buffer.shape, buffer.dtype) == (value.shape, dtype):
        return buffer.copy_(value)
    return value.to(device, dtype, copy=True)


def _place(leaf: Any) -> tuple[Any, ...]:
    """Where a tensor lies and how it is read; of a plain value its type and itself, since True == 1 == 1.0."""
    return (leaf.data_ptr(), leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _joined(one: Any, other: Any) -> Any:
    """The arguments of both evaluations with guidance, on one device."""
    return torch.cat([one, other.to(one.device, one.dtype)]) if isinstance(one, Tensor) else one


def _described(output: object) -> str:
    """What an error says of a network's output or input."""
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}"
    dense = output.layout == torch.strided and not output.is_nested
    what = f"{tuple(output.shape)} {output.dtype}" if dense else f"a {output.layout} tensor"
    return f"{what} on {output.device}"
