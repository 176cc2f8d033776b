"""The buffers of a batch, and the computations on them: the network alone, and whole reverse steps.

Everything that a step reads and writes is in tensors at fixed addresses: the states, the table, and the position, seed
and sample index of each entry. So one captured CUDA graph serves every step of every schedule: it needs no argument, no
wait and no allocation.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.precision import arithmetic
from fastddpm.core.table import COLUMNS, StepTable
from fastddpm.networks.unet2d import UNet2D
from fastddpm.ops.step import repeated_step
from fastddpm.sampling import own_network
from fastddpm.sampling.capture import CaptureError, NoWaiting, StreamOrder, capture
from fastddpm.sampling.fixed_reads import FixedReads
from fastddpm.sampling.model import PreparedModel

Network = Callable[..., Any]


class OutputError(ValueError):
    """The network's output does not have the type, shape or device that its input requires."""


class BatchNetwork:
    """The network with its buffers for batches of n.

    Attributes:
        input: [n, *shape], channels-last: what the network reads, in the precision of a `UNet2D`; any other model is
            handed copies of these float32 states, see `own_network`.
        timesteps: [T] int32; the first S are the loaded ones.
        positions: [n] int32: which of the timesteps each entry is at.
        labels: [n, ...]: the class labels that were loaded, or None.
        replay: runs the work of the batch: calls of the network, or the steps of the `Runner` that has this network.
        order: orders this work across streams.
    """

    def __init__(self, prepared: PreparedModel, n: int, *, capture: bool):
        self.prepared = prepared
        device, T, net = prepared.device, prepared.num_train_timesteps, prepared.net
        dtype = torch.float32 if net is None else prepared.dtype
        self.input = layout.empty(n, prepared.shape, dtype=dtype, device=device)
        self.timesteps = torch.empty(T, dtype=torch.int32, device=device)
        self._t = torch.empty(T, dtype=torch.int64, device=device) if net is None else None  # other networks' t
        self.positions = torch.empty(n, dtype=torch.int32, device=device)
        self.labels: Tensor | None = None
        self._time_rows: Tensor | None = None  # [T, columns] of a `UNet2D`
        self._output: Tensor | None = None
        self._may_share_position = self._one_position = False
        self._is_first = True  # call of the network since `load`
        if net is not None:
            kernels = ops.backend(device) != "torch"
            columns = cast(nn.Linear, net.projection).out_features
            rows_dtype = torch.float32 if kernels else prepared.dtype
            self._time_rows = torch.empty(T, columns, dtype=rows_dtype, device=device)
            # without kernels the one row of a batch becomes a bias of convolutions
            self._one_position = self._may_share_position = not kernels
        self.replay = Replay(prepared, n, capture=capture)
        self.order = StreamOrder(device)

    @contextmanager
    def working(self) -> Iterator[None]:
        """The context in which calls must be made. The current CUDA stream may differ from call to call."""
        with plain_modes(self.prepared.device), self.order.on_current_stream(self.tensors()):
            yield

    def tensors(self) -> Iterator[Tensor]:
        """Everything that a call reads and writes on the device."""
        buffers = self.input, self.timesteps, self._t, self.positions, self.labels, self._time_rows, self._output
        yield from (buffer for buffer in buffers if buffer is not None)
        yield from self.prepared.weights()

    def prepare(self, timesteps: Tensor, labels: Tensor | None = None, *, per_entry: bool = False) -> None:
        """Get ready for calls at some timesteps.

        Args:
            timesteps: [S] integers, on any device.
            labels: [n] int64 (or [n, ...], as an embedding of type "identity" takes them) for a class-conditional
                `UNet2D`.
            per_entry: whether the entries of a batch will be at different timesteps.
        """
        if self.prepared.net is not None:
            self._one_position = self._may_share_position and not per_entry
        with self.working():
            self.load(timesteps, labels)
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

    def load(self, timesteps: Tensor, labels: Tensor | None) -> None:
        """Copy timesteps and labels into the buffers; see `prepare`."""
        S, device = len(timesteps), self.prepared.device
        self._is_first = True
        self.timesteps[:S].copy_(timesteps)
        if self._t is not None:
            self._t[:S].copy_(timesteps)
        if labels is None or self.labels is None or labels.shape != self.labels.shape:
            dtype = torch.float32 if labels is not None and labels.is_floating_point() else torch.int64
            self.labels = None if labels is None else labels.to(device, dtype, copy=True)
        else:
            self.labels.copy_(labels)
        if self.prepared.net is not None and labels is None:
            with arithmetic("fp32", device):
                cast(Tensor, self._time_rows)[:S] = self.prepared.net.time_rows(self.timesteps[:S])

    def predict(self, network: Network | None = None, *, outputs: tuple[int, ...] = (1,)) -> Tensor:
        """Evaluate the network on the buffers.

        Args:
            network: what to call; None: the model's `forward`.
            outputs: how many values it may return for each element of its input.
        Returns: the model's output, channels-last.
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
                t = cast(Tensor, self._t).index_select(0, self.positions)
                with own_network.noticing_random_numbers(prepared.device) if self._is_first else nullcontext():
                    model_output = own_network.call(
                        network,
                        self.input,
                        t,
                        prepared.compute,
                        dtype=prepared.own_dtype,
                        memory_format=prepared.memory_format,
                        labels=self.labels,
                    )
                self._is_first = False
        n, c, *spatial = self.input.shape
        shapes = [(n, c * values, *spatial) for values in outputs]
        dense = isinstance(model_output, Tensor) and model_output.layout == torch.strided and not model_output.is_nested
        like_input = dense and model_output.shape in shapes and model_output.device == self.input.device
        if not like_input or not model_output.is_floating_point():
            raise OutputError(
                f"the network returned {_described(model_output)} for {_described(self.input)}; want a dense tensor "
                "with one floating-point number per element: by itself, as `.sample`, or first in a tuple"
            )
        output = model_output if model_output.dtype in ops.FLOATS else model_output.float()
        return output if layout.is_channels_last(output) else layout.channels_last(output)

    def constants(self) -> object:
        """What a captured graph fixes but the next batch may change: addresses, and torch's settings."""
        cudnn, cuda, model = torch.backends.cudnn, torch.backends.cuda, self.prepared.model
        weights: tuple[Tensor, ...] = ()
        if isinstance(model, nn.Module) and self.prepared.compiles:
            weights = (*model.parameters(), *model.buffers())
        return (
            self._one_position,
            None if self.labels is None else self.labels.data_ptr(),
            () if self.prepared.net is not None else tuple(weight.data_ptr() for weight in weights),
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
            (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
            cuda.cudnn_sdp_enabled(),
        )

    def _columns(self) -> Tensor:
        """[1 or n, columns]: everything in the network that depends on t (and the class) alone."""
        positions = self.positions[:1] if self._one_position else self.positions
        rows = cast(Tensor, self._time_rows)
        if self.labels is None:
            return rows.index_select(0, positions)
        t = self.timesteps.index_select(0, positions)
        return cast(UNet2D, self.prepared.net).time_rows(t, self.labels).to(rows.dtype)

    def _predict_into_output(self, network: Network | None) -> None:
        self._output = self.predict(network, outputs=(1, 2))  # twice the channels: a learned variance too

    def _reset(self) -> None:
        self.input.zero_()
        self.positions.zero_()


class Runner:
    """A batch of samples on its way from x_T to x_0.

    Attributes:
        network: evaluates the network. Its positions are the rows of the table that the entries are at; all are equal.
        x: [n, *shape] float32, channels-last: the states x_t. It is the network's input if that is float32.
        address: [n, 2] int64: (seed, sample index) of each entry, see `noise.address`.
        bad: [n] int32: the row at which a value first was not finite; -1: all values are finite.
        table: [T] rows; the first S are the loaded ones.
    """

    def __init__(self, prepared: PreparedModel, n: int, *, capture: bool):
        self.prepared = prepared
        self.network = BatchNetwork(prepared, n, capture=capture)
        device, T = prepared.device, prepared.num_train_timesteps
        self.x = self.network.input
        if self.x.dtype != torch.float32:
            self.x = layout.empty(n, prepared.shape, dtype=torch.float32, device=device)
        self.address = torch.empty(n, 2, dtype=torch.int64, device=device)
        self.bad = torch.empty(n, dtype=torch.int32, device=device)
        self._one = torch.ones((), dtype=torch.int32, device=device)
        rows = torch.empty(T, len(COLUMNS), dtype=torch.float32, device=device)
        self.table = StepTable(rows, rows.new_ones(T), self.network.timesteps, clip=False, num_train_timesteps=T)
        self._take_step = self._step_of_table()

    @contextmanager
    def working(self) -> Iterator[None]:
        """The context in which all methods must be called. The current CUDA stream may differ from call to call."""
        with plain_modes(self.prepared.device), self.network.order.on_current_stream(self._tensors()):
            yield

    def load(self, table: StepTable, address: Tensor, labels: Tensor | None = None) -> None:
        """Copy what decides a batch into the buffers; compile and capture a step if need be. Overwrites x.

        Args:
            table: S rows, on any device.
            address: [n, 2] int64, on any device.
            labels: as `BatchNetwork.prepare` takes them.
        """
        S = len(table)
        self._loaded = table
        self.table = replace(self.table, clip=table.clip)
        self.table.rows[:S].copy_(table.rows)
        self.table.scale[:S].copy_(table.scale)
        self.address.copy_(address)
        self.network.load(table.timesteps, labels)
        self._take_step = self._step_of_table()
        self.network.replay.prepare(self._predict_and_update, self.start, (table.clip, self.network.constants()))

    def start(self) -> None:
        """Draw x_T ~ N(0, I) of each entry, and go to the first step of the table."""
        T = torch.full_like(self.address[:, 0], self.table.num_train_timesteps)
        self.x.copy_(ops.normal(self.address, self.x.shape[1:], stream=noise.START, t=T))
        if self.network.input is not self.x:
            self.network.input.copy_(self.x)
        self.network.positions.fill_(self.steps - 1)
        self.bad.fill_(-1)

    def step(self) -> None:
        """Take one reverse step, x_t -> x_{t-1}, and go to the next row."""
        self.network.replay(self._predict_and_update)

    def predict(self, network: Network | None = None) -> Tensor:
        """The first half of a step: the model's output for x_t.

        Raises: ValueError: the network returned something else than one value per element; the message names the step.
        """
        try:
            return self.network.predict(network)
        except OutputError as error:
            with _disable_current_modes():  # `NoWaiting` would refuse to read the position
                row = int(self.network.positions[0])
            raise ValueError(f"{self.describe_step(row)}: {error}") from error

    def update(self, model_output: Tensor) -> None:
        """The second half of a step: x_t -> x_{t-1}, and on to the next row."""
        self._take_step(model_output)
        self.network.positions.sub_(self._one)

    @property
    def steps(self) -> int:
        """S, the rows of the loaded table."""
        return len(self._loaded)

    def describe_step(self, row: int) -> str:
        """What messages call the step at a row."""
        return f"step {self.steps - row} of {self.steps} (t = {int(self._loaded.timesteps[row])})"

    def _step_of_table(self) -> Callable[[Tensor], None]:
        copy = None if self.network.input is self.x else self.network.input
        return repeated_step(self.x, self.table, self.network.positions, self.address, out=copy, bad=self.bad)

    def _predict_and_update(self, network: Network | None) -> None:
        self.update(self.predict(network))

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.network.tensors()
        yield from (self.x, self.address, self.bad, self.table.rows, self.table.scale)


class Replay:
    """Runs the same work on the same buffers again and again: directly, or as the replay of a captured CUDA graph.

    The work is a function of the network to call. It is passed to each method, not stored: it is a method of the
    object that owns this one, and a reference cycle would delay the release of their memory.
    """

    def __init__(self, prepared: PreparedModel, n: int, *, capture: bool):
        self.prepared, self.n = prepared, n
        self.capture = capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self._prepared_for: object = None
        self._reads: FixedReads | None = None  # of a graph of a network that is not a fused `UNet2D`

    def __call__(self, run: Callable[[Network | None], None]) -> None:
        if self.graph is None:
            run(None)
        else:
            self.graph.replay()

    def prepare(self, run: Callable[[Network | None], None], reset: Callable[[], None], constants: object) -> None:
        """Compile and capture the work, unless this was already done with the same constants.

        Args:
            reset: fills the buffers with valid inputs; called before and after, as the work overwrites them.
            constants: what a captured graph fixes; if they change, the work is captured again.
        """
        prepared = self.prepared

        def run_once(network: Network | None) -> None:
            reset()
            run(network)

        if not (self.capture or prepared.compiles):
            return
        if self._prepared_for == constants and (self._reads is None or self._reads.are_current(run_once)):
            return
        self._prepared_for = self.graph = self._reads = None
        if self.capture:
            with NoWaiting(), ops.compiling(prepared.device):
                run_once(prepared.plain_forward)
            if prepared.net is None:
                self._reads = FixedReads(prepared.plain_forward, run_once, prepared.device)
        with _many_versions() if prepared.compiles else nullcontext():
            run_once(None)
        if self.capture:
            self.graph = self._captured(run)
        self._prepared_for = constants
        reset()

    def _captured(self, run: Callable[[Network | None], None]) -> torch.cuda.CUDAGraph | None:
        """Capture the work. Returns: the graph, or None if kind is "auto" and two attempts have failed."""
        prepared = self.prepared
        for _ in range(2):
            try:
                # a capture frees cuBLAS's workspaces; `arithmetic` excludes products of other networks meanwhile
                with prepared.compute.arithmetic():
                    return capture(lambda: run(None), prepared.device)
            except CaptureError as error:
                if prepared.kind != "auto":
                    raise
                failure = str(error)  # not the error: its traceback would keep tensors alive
        way_out = "engine.clear() allows another attempt"
        warnings.warn(f"{failure}. Batches of {self.n} now run eagerly, with the same bits; {way_out}", stacklevel=2)
        return None


@contextmanager
def plain_modes(device: torch.device) -> Iterator[None]:
    """A context on this device without gradients, inference mode and autocast, which the caller may have enabled."""
    there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    # buffers created in inference mode could not be used outside it
    with there, torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _many_versions() -> Any:
    """Lift torch.compile's limit of eight versions of a function: each batch size and each network needs its own."""
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)


def _described(output: object) -> str:
    """What an error says of a network's output or input."""
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}"
    dense = output.layout == torch.strided and not output.is_nested
    what = f"{tuple(output.shape)} {output.dtype}" if dense else f"a {output.layout} tensor"
    return f"{what} on {output.device}"
