"""The engine runs a model eagerly, compiled or as a CUDA graph, and keeps the buffers of a batch for the next one."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.core.checks import one_of
from fastddpm.core.names import ENGINES
from fastddpm.core.precision import Compute
from fastddpm.networks.fused import is_own, kind_name, obstacles_of
from fastddpm.networks.obstacles import called_as_it_is
from fastddpm.sampling.batch_network import BatchNetwork
from fastddpm.sampling.capture import empty_cache
from fastddpm.sampling.chains import Chains
from fastddpm.sampling.conditions import NOTHING, InputForm
from fastddpm.sampling.model import Model, PreparedModel
from fastddpm.sampling.replay import plain_modes
from fastddpm.sampling.runner import Runner

WORTH_CAPTURING = 16  # steps: capturing takes as long as a few of them
KEPT = 4  # sizes and forms of batches whose buffers and graph are kept


class Engine:
    """Runs a model on batches of any size.

    All work runs on the caller's current CUDA stream, so results can be used there without synchronization.

    Args:
        model, shape, num_train_timesteps, compute, own_dtype, times: see `PreparedModel`.
        kind: one of ENGINES, or "auto": a fused `UNet2D` or `UNet1D` on a GPU with Triton is captured if the run has
            at least WORTH_CAPTURING steps; everything else runs eagerly. If a capture fails twice, "auto" warns and
            runs eagerly. Both ways launch the same kernels on the same values, so the results have the same bits.
    A pickle or a copy has the arguments alone; buffers and graphs are made anew.

    Raises: ValueError: kind is unknown, or not for this device.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        shape: tuple[int, ...],
        num_train_timesteps: int,
        compute: Compute,
        kind: str = "auto",
        own_dtype: torch.dtype | None = None,
        times: Tensor | None = None,
    ):
        one_of("engine", kind, ("auto", *ENGINES))
        if "graph" in kind and compute.device.type != "cuda":
            raise ValueError(
                f"engine is {kind!r}, but '{compute.device}' has no CUDA graphs; use 'eager' or 'compiled'"
            )
        self.model, self.compute = model, compute
        self._arguments = model, shape, num_train_timesteps, compute, kind, own_dtype, times
        self._warned_of: set[str] = set()
        self._idle: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> tuple[Any, ...]:
        return self._arguments

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        model, shape, num_train_timesteps, compute, kind, own_dtype, times = state
        if compute.device.type == "cpu":  # perhaps in place of a GPU, see `Compute`
            kind = {"graph": "eager", "compiled+graph": "compiled"}.get(kind, kind)
        Engine.__init__(self, model, shape, num_train_timesteps, compute, kind, own_dtype, times)

    @cached_property
    def prepared(self) -> PreparedModel:
        """The model as it was when last looked at. In a copy it is not complete until all of the copy is made."""
        return PreparedModel(*self._arguments)

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def compiles(self) -> bool:
        """Whether the first batch of a size is compiled, which takes minutes."""
        return self.prepared.compiles

    def captures(self, steps: int) -> bool:
        """Whether a run of so many steps is captured as a CUDA graph."""
        if self.prepared.kind == "auto":
            on_kernels = ops.backend(self.device) == "triton" and steps >= WORTH_CAPTURING
            return on_kernels and is_own(self.model) and not obstacles_of(self.model)
        return "graph" in self.prepared.kind

    @contextmanager
    def runner(self, n: int, *, capture: bool, form: InputForm = NOTHING.form) -> Iterator[Runner]:
        """A runner for a batch of n, with the model's current weights, for exclusive use until the context ends.

        The caller's modes, such as autocast, do not apply in this context.

        Args: capture: whether to take steps as replays of a CUDA graph; see `captures`.
        """
        with self._held(Runner, n, capture, form) as runner, runner.working():
            yield runner

    @contextmanager
    def network(self, n: int, *, capture: bool) -> Iterator[BatchNetwork]:
        """The network alone, for batches of n; otherwise like `runner`. Call it in its `working` context."""
        with self._held(BatchNetwork, n, capture, NOTHING.form) as network:
            yield network

    @contextmanager
    def chains(self, n: int, window: int, *, capture: bool, form: InputForm) -> Iterator[Chains]:
        """Chains for n samples at a time; otherwise like `runner`. Call their methods in their `working` context."""
        with self._held(Chains, n, capture, form, window=window) as chains:
            yield chains

    @contextmanager
    def _held(self, kind: type, n: int, capture: bool, form: InputForm, **more: int) -> Iterator[Any]:
        key = kind, n, capture, form, *more.values()
        with self._lock, plain_modes(self.device):
            self._look_at_model()
            self.prepared.refresh()
            held = self._idle.pop(key, None) or kind(self.prepared, n, capture=capture, form=form, **more)
        yield held
        with self._lock:
            if held.prepared is self.prepared:
                self._idle[key] = held
            while len(self._idle) > KEPT:
                del self._idle[next(iter(self._idle))]

    def _look_at_model(self) -> None:
        """Prepare the model anew if it is one of our own that was changed; warn if it cannot be fused."""
        prepared = self.prepared.current()
        if prepared is not self.prepared:
            self.prepared = prepared
            self._idle.clear()
        obstacle = next(iter(prepared.obstacles), None)
        if obstacle is not None and obstacle not in self._warned_of:
            self._warned_of.add(obstacle)
            warnings.warn(called_as_it_is(kind_name(self.model), prepared.obstacles), stacklevel=2)

    def clear(self) -> bool:
        """Free the buffers and graphs that are kept. Returns: whether there were any."""
        with self._lock:
            kept = bool(self._idle)
            self._idle.clear()
        empty_cache(self.device)
        return kept
