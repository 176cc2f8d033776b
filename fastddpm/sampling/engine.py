"""The engine takes a batch one step further: eagerly, compiled, or as one replay of a captured CUDA graph.

All that a step reads and writes lies in tensors that `Slots` owns, at fixed addresses: the states, the tables, and the
row, seed and sample index of each entry. So one captured graph is every step of every schedule - the network, the fused
update, the next position - and needs no argument, no wait and no allocation. All work runs on the caller's current
stream, so results can be used there without synchronization.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastddpm import ops
from fastddpm.core import layout, noise
from fastddpm.core.schedule import StepTable
from fastddpm.networks.unet2d import UNet2D
from fastddpm.sampling.capture import CaptureError, NoWaiting, StreamOrder, capture, empty_cache

Model = Callable[[Tensor, Tensor], Tensor]  # (x_t, t [N] int64) -> eps, x_0 or v, like x_t

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ENGINES = ("eager", "compiled", "graph", "compiled+graph")
WORTH_CAPTURING = 16  # steps: capturing costs a few of them
CACHED = 4  # batch sizes whose buffers and graph are kept

_settings = threading.RLock()


class Engine:
    """A network made ready to sample with; `Slots` for batches, which are kept for the next batch of their size.

    Args:
        model: as of `Sampler`.
        shape: of one sample, channels first.
        num_train_timesteps: T; no table has more rows.
        device: a CPU or CUDA device.
        precision: one of PRECISIONS.
        kind: one of ENGINES, or "auto": a `UNet2D` on a GPU with Triton is captured if the run has at least
            WORTH_CAPTURING steps; everything else runs eagerly. If a capture fails twice, "auto" warns and runs
            eagerly. Both ways launch the same kernels on the same values, so the results have the same bits.
    Raises: ValueError: kind is unknown, or not for this device.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        shape: tuple[int, ...],
        num_train_timesteps: int,
        device: torch.device,
        precision: str,
        kind: str = "auto",
    ):
        if kind not in ("auto", *ENGINES):
            raise ValueError(f"engine is {kind!r}; want one of auto, {', '.join(ENGINES)}")
        if "graph" in kind and device.type != "cuda":
            raise ValueError(f"engine is {kind!r}, and '{device}' has no CUDA graphs; use 'eager' or 'compiled'")
        self.model, self.shape, self.num_train_timesteps = model, shape, num_train_timesteps
        self.device, self.precision, self.dtype, self.kind = device, precision, PRECISIONS[precision], kind
        self.compiles = "compiled" in kind
        self.net: UNet2D | None = None
        self.plain: Callable[..., Any] = model
        self.network: Callable[..., Any] | None = None  # the same, perhaps compiled
        self._idle: dict[tuple[type[Slots], int, bool], Any] = {}
        self._lock = threading.RLock()

    @contextmanager
    def slots(self, n: int, steps: int) -> Iterator["Slots"]:
        """Slots for a batch of n, nobody else's until the context ends, to `advance` so many times.

        Work runs on the current stream. The network has the model's current weights. The caller's modes, such as
        autocast, do not apply.
        """
        with self._held(Slots, n, steps) as slots, slots.working():
            yield slots

    @contextmanager
    def forward(self, n: int, steps: int) -> Iterator["Forward"]:
        """The network alone, for a batch of n, nobody else's until the context ends, to be called so many times.

        The calls are to be made where it is `working`.
        """
        with self._held(Forward, n, steps) as forward:
            yield forward

    @contextmanager
    def _held(self, kind: Any, n: int, steps: int) -> Iterator[Any]:
        captures = bool(steps) and ("graph" in self.kind or (self._captures_by_itself and steps >= WORTH_CAPTURING))
        key = kind, n, captures
        with self._lock, _plainly(self.device):
            with self._weights_order.on_current_stream(self._weights()), arithmetic("fp32", self.device):
                self._refresh()
            slots = self._idle.pop(key, None) or kind(self, n, captures)
        yield slots
        with self._lock:
            self._idle[key] = slots
            while len(self._idle) > CACHED:
                del self._idle[next(iter(self._idle))]

    def clear(self) -> bool:
        """Free the memory of the slots that are kept; whether there were any."""
        with self._lock:
            kept = bool(self._idle)
            self._idle.clear()
        empty_cache(self.device)
        return kept

    @property
    def _captures_by_itself(self) -> bool:
        return self.kind == "auto" and isinstance(self.model, UNet2D) and ops.backend(self.device) == "triton"

    @cached_property
    def _weights_order(self) -> StreamOrder:
        """Orders the updates of the weights across streams."""
        return StreamOrder(self.device)

    def _weights(self) -> list[Tensor]:
        return [] if self.net is None else list(self.net.parameters())

    def _refresh(self) -> None:
        """Make the network, or let it have the weights that the model has now."""
        if isinstance(self.model, UNet2D):
            if self.net is None:
                self.net = self.model.for_inference(self.dtype, self.device, pack=not self.compiles)
                self.plain = self.net.denoise
            else:
                self.net.refresh(self.model)
        self.network = self.network or self._compiled(self.plain, fullgraph=self.net is not None)

    def _compiled(self, network: Callable[..., Any], *, fullgraph: bool = False) -> Callable[..., Any]:
        if not self.compiles:
            return network
        mode = "max-autotune-no-cudagraphs" if self.device.type == "cuda" else "default"
        return torch.compile(network, fullgraph=fullgraph, dynamic=False, mode=mode)


class Slots:
    """The entries of a batch and what advances them.

    Attributes:
        x: [n, *shape] float32, channels-last: the states x_t.
        low: x in the precision of a `UNet2D`, which reads it; x itself where that is float32, or for another model.
        pos: [n] int32: the row of the table each entry is at. Without the kernels of a GPU a `UNet2D` reads but the
            first of them, as all are the same after `load`.
        address: [n, 2] int64: (seed, sample index) of each, see `noise.address`.
        bad: [n] int32: the row at which a value first was not finite, -1 while all are.
        table: [T] rows, of which the first S are those that were loaded.
    """

    returns: tuple[int, ...] = (1,)  # how many numbers a network may return for each element of x

    def __init__(self, engine: Engine, n: int, captures: bool):
        self.engine: Engine = weakref.proxy(engine)  # which holds these: graphs shall go when it does
        self.captures = captures
        device, T = engine.device, engine.num_train_timesteps
        self.x = self.low = layout.empty(n, engine.shape, dtype=torch.float32, device=device)
        self.address = torch.empty(n, 2, dtype=torch.int64, device=device)
        self.pos, self.bad = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
        rows = torch.empty(T, 8, dtype=torch.float32, device=device)
        self.table = StepTable(rows, rows.new_ones(T), torch.empty(T, dtype=torch.int32, device=device), False, T)
        self.labels: Tensor | None = None
        if engine.net is not None:
            if engine.dtype != torch.float32:
                self.low = layout.empty(n, engine.shape, dtype=engine.dtype, device=device)
            self._kernels = ops.backend(device) == "triton"
            self._stand(apart=False)
            self._time_dtype = torch.float32 if self._kernels else engine.dtype
            columns = engine.net.projection.out_features  # type: ignore[union-attr]
            self._time_rows = torch.empty(T, columns, dtype=self._time_dtype, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prepared_for: object = None
        self._order = StreamOrder(device)

    @contextmanager
    def working(self) -> Iterator[None]:
        """The context in which all of these methods must be called. The current stream may differ from call to call."""
        with _plainly(self.engine.device), self._order.on_current_stream(self._tensors()):
            yield

    def _tensors(self) -> Iterator[Tensor]:
        """The tensors that a step reads and writes."""
        parts = tree_leaves((vars(self), vars(self.table), self.engine._weights()))
        yield from (part for part in parts if isinstance(part, Tensor))

    def load(self, table: StepTable, address: Tensor, labels: Tensor | None = None) -> None:
        """Start a batch: x_T of each entry, at the first step of a table.

        Args:
            table: S rows, on any device.
            address: [n, 2] int64, on any device.
            labels: [n] int64 (or [n, ...], as an embedding of type "identity" takes them) for a class-conditional
                `UNet2D`.
        """
        engine, S = self.engine, len(table)
        self._loaded = table
        self.table = replace(self.table, clip=table.clip)
        self.table.rows[:S].copy_(table.rows)
        self.table.scale[:S].copy_(table.scale)
        self.table.timesteps[:S].copy_(table.timesteps)
        self.address.copy_(address)
        if labels is None or self.labels is None or labels.shape != self.labels.shape:
            dtype = torch.float32 if labels is not None and labels.is_floating_point() else torch.int64
            self.labels = None if labels is None else labels.to(engine.device, dtype, copy=True)
        else:
            self.labels.copy_(labels)
        if engine.net is not None and labels is None:
            with arithmetic("fp32", engine.device):
                self._time_rows[:S] = engine.net.time_rows(self.table.timesteps[:S])
        self._start()
        if (self.captures or engine.compiles) and self._prepared_for != (now := self._built_in()):
            self._prepare()
            self._prepared_for = now
            self._start()

    def advance(self) -> None:
        """Take one step."""
        if self._graph is None:
            self._once()
        else:
            self._graph.replay()
            self.k -= 1

    def predict(self, network: Callable[..., Any] | None = None) -> Tensor:
        """The first half of a step: what the network makes of x, in channels-last memory.

        Raises: ValueError: it is not a tensor with one number for each element of x; the message names the step.
        """
        engine = self.engine
        network = network or cast(Callable[..., Any], engine.network)
        with arithmetic(engine.precision, engine.device):
            if engine.net is not None:
                with arithmetic("fp32", engine.device):
                    columns = self._columns()
                m = network(self.low, columns)
            else:
                t = self.table.timesteps.index_select(0, self.pos).long()
                # without a cache: it would keep, and a graph build in, the weights as they are now
                with torch.autocast(
                    engine.device.type, engine.dtype, enabled=engine.dtype != torch.float32, cache_enabled=False
                ):
                    m = network(self.x.clone(), t)  # a model may write to its input
        n, c, *spatial = self.x.shape
        if (
            not isinstance(m, Tensor)
            or m.shape not in [(n, c * times, *spatial) for times in self.returns]
            or not m.is_floating_point()
            or m.device != self.x.device
        ):
            came = f"{tuple(m.shape)} {m.dtype} on {m.device}" if isinstance(m, Tensor) else f"a {type(m).__name__}"
            raise ValueError(
                f"{self.step(self.k)}: the network returned {came} for {tuple(self.x.shape)} on {self.x.device}; want "
                "a tensor with one value per element (lambda x, t: unet(x, t).sample for a diffusers model)"
            )
        return layout.channels_last(m if m.dtype in ops.FLOATS else m.float())

    def update(self, m: Tensor) -> None:
        """The second half: x_t -> x_{t-1}, and on to the next row."""
        out = None if self.low is self.x else self.low
        ops.step(self.x, m, self.table, self.pos, self.address, out=out, bad=self.bad)
        self.pos -= 1
        self.k -= 1

    def _once(self, network: Callable[..., Any] | None = None) -> None:
        """What a graph holds."""
        self.update(self.predict(network))

    def step(self, k: int) -> str:
        """What the step at row k is called in a message."""
        S = len(self._loaded)
        return f"step {S - k} of {S} (t = {int(self._loaded.timesteps[k])})"

    def _stand(self, *, apart: bool) -> None:
        """Say whether the entries of a batch may be at different rows.

        Without kernels a row that serves the whole batch is a bias of convolutions, in their precision.
        """
        self._at = self.pos if self._kernels or apart else self.pos[:1]

    def _columns(self) -> Tensor:
        """[1 or n, columns]: all of the network that depends on t (and the class) alone."""
        if self.labels is None:
            return self._time_rows.index_select(0, self._at)
        t = self.table.timesteps.index_select(0, self._at)
        return cast(UNet2D, self.engine.net).time_rows(t, self.labels).to(self._time_dtype)

    def _start(self) -> None:
        T, self.k = self.table.num_train_timesteps, len(self._loaded) - 1
        self.x.copy_(noise.normal(self.address, self.engine.shape, stream=noise.START, t=T))
        self.low.copy_(self.x)
        self.pos.fill_(self.k)
        self.bad.fill_(-1)

    def _built_in(self) -> object:
        """What a graph has built in and may be another at the next load: addresses, and torch's choice of kernels."""
        labels, cudnn, cuda, model = self.labels, torch.backends.cudnn, torch.backends.cuda, self.engine.model
        weights = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
        return (
            self.table.clip,
            None if self.engine.net is None else len(self._at),
            None if labels is None else labels.data_ptr(),
            () if self.engine.net is not None else tuple(weight.data_ptr() for weight in weights),
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
            (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
            cuda.cudnn_sdp_enabled(),
        )

    def _prepare(self) -> None:
        """Compile and capture a step; the states are spoilt."""
        self._graph = None
        if self.captures:
            with NoWaiting(), ops.compiling(self.engine.device):
                self._once(self.engine.plain)
            self._start()
        with _many_versions() if self.engine.compiles else nullcontext():
            self._once()
        if self.captures:
            self._graph = self._captured()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """Capture a step. Returns: the graph, or None if kind is "auto" and two attempts have failed."""
        for _ in range(2):
            try:
                # it frees the workspaces of cuBLAS, so no other network may be launching a product
                with arithmetic(self.engine.precision, self.engine.device):
                    return capture(self._once, self.engine.device)
            except CaptureError as error:
                if self.engine.kind != "auto":
                    raise
                failure = str(error)  # not the error: its traceback would keep tensors alive
        n = len(self.x)
        text = f"{failure}. Batches of {n} now run eagerly, with the same bits; engine.clear() allows another attempt"
        warnings.warn(text, stacklevel=2)
        return None


class Forward(Slots):
    """The network alone, for a loop with an update of its own."""

    returns = (1, 2)  # a learned variance, too

    def prepare(self, timesteps: Tensor, labels: Tensor | None = None, *, apart: bool = False) -> None:
        """Begin a run at some timesteps, [S] integers, with labels as `load` takes them.

        Args: apart: whether the entries of a batch will be at different ones.
        """
        S, T = len(timesteps), self.table.num_train_timesteps
        if self.engine.net is not None:
            self._stand(apart=apart)
        with self.working():
            table = StepTable(torch.zeros(S, 8), torch.ones(S), timesteps.int(), False, T)
            self.load(table, torch.zeros(len(self.x), 2, dtype=torch.int64), labels)

    def at(self, x: Tensor, i: int | Tensor) -> Tensor:
        """What the network makes of x, [n, *shape] floating point, at the i-th timestep: new, in its precision.

        Args: i: of all entries, or [n] integers on x's device with that of each, where `prepare` was told.
        """
        self.low.copy_(x)
        if isinstance(i, Tensor):
            self.pos.copy_(i)
        else:
            self.pos.fill_(i)
        if self._graph is None:
            self._once()
            return self._m
        self._graph.replay()
        return self._m.clone()

    def step(self, k: int) -> str:
        return "sampling"

    def _once(self, network: Callable[..., Any] | None = None) -> None:
        self._m = self.predict(network)

    def _start(self) -> None:
        self.k = 0
        self.low.zero_()
        self.pos.zero_()


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """float32 on a GPU is float32, but TF32 where that is the precision; torch's settings are as before afterwards.

    They are those of the process: by default cuDNN's convolutions round to TF32. So one thread at a time has them.
    """
    if device.type != "cuda":
        yield
        return
    with _settings, ExitStack() as after:
        for get, set_, value in _float32_settings(precision == "tf32"):
            after.callback(set_, get())
            set_(value)
        yield


def _float32_settings(tf32: bool) -> list[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """(get, set, value) of torch's settings: by their older names, or by the newer, where those have been used."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    older: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high" if tf32 else "highest"),
        (partial(getattr, cudnn, "allow_tf32"), partial(setattr, cudnn, "allow_tf32"), tf32),
    ]
    try:
        for get, _, _ in older:
            get()
        return older
    except RuntimeError:
        owners, value = (matmul, cudnn.conv, cudnn.rnn), "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]
        name = "fp32_precision"
        return [(partial(getattr, owner, name), partial(setattr, owner, name), value) for owner in owners]


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    # in inference mode the buffers would be unfit for a run outside of it
    with there, torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _many_versions() -> Any:
    """torch.compile gives a function up after eight versions; each batch size is one, and each network."""
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
