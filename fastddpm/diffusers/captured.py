"""Calls of a diffusers network as replays of CUDA graphs, while a pipeline runs.

What is captured is diffusers' own forward, in the caller's precision and with torch's settings. So a replay launches
the same kernels on the same values. All tensors among the arguments lie in buffers that the graph reads; all other
arguments are constants of the graph.
"""

import inspect
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial, update_wrapper
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, ref

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastddpm.core.checks import is_real
from fastddpm.core.precision import Compute, arithmetic_as_set, float32_settings
from fastddpm.diffusers.obstacles import Diverted, can_be_captured, has_own_forward, warn_of_forward
from fastddpm.sampling.capture import StreamOrder
from fastddpm.sampling.engine import KEPT
from fastddpm.sampling.model import PreparedModel
from fastddpm.sampling.replay import Network, Replay, plain_modes, torch_settings

REMEMBERED = 16  # forms of calls

_graphs: "WeakKeyDictionary[nn.Module, Graphs]" = WeakKeyDictionary()


@contextmanager
def capturing(unet: Any) -> Iterator[None]:
    """A context in which this thread's calls of a network on a GPU are replays of CUDA graphs where that is possible.

    A graph serves all calls of a form: with the same shapes, dtypes and plain arguments. The first call of a form runs
    as it is, so a form that is used only once costs nothing; the second one captures. At the first call of a form in
    this context, the network is compared with what was captured, and captured again if it was changed: a parameter
    that was replaced, an adapter that was loaded or set to another scale. Later changes in this context are noticed if
    they replace parameters or modules. Values that change in place are read by the graph itself.

    diffusers' forward serves all other calls: those on a CPU, those that need a gradient, those whose arguments have
    objects besides tensors, numbers and strings, and all calls of a network that cannot be captured, for which the
    reason is logged as a warning, once.
    """
    if not has_own_forward(unet):
        vars(unet).pop("forward", None)  # the method of its class
    elif isinstance(unet.forward, Calls):  # of another context of this network
        yield
        return
    calls = Calls(unet)
    # a compiled network would be compiled again for each context
    if unet._compiled_call_impl is not None or vars(unet).setdefault("forward", calls) is not calls:
        can_be_captured(unet)
        yield
        return
    try:
        yield
    finally:
        if vars(unet).get("forward") is calls:
            del vars(unet)["forward"]


def forget(unet: Any) -> None:
    """Free the graphs of a network, and try again to capture what could not be captured."""
    _graphs.pop(unet, None)


def is_capturable(device: torch.device) -> bool:
    """Whether work on a device can be captured now."""
    busy = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    return device.type == "cuda" and not busy


class CallForm(NamedTuple):
    """What a graph fixes of the arguments of a call: equal forms can be served by one graph.

    Attributes:
        spec: the nesting of the arguments.
        leaves: of each tensor its shape, dtype and strides; of any other argument its type and value.
        t_shape: () or [N].
        autocast: the dtype of autocast on the device, if it is enabled.
    """

    spec: Any
    leaves: tuple[Any, ...]
    t_shape: tuple[int, ...]
    device: torch.device
    autocast: torch.dtype | None


class Arguments(NamedTuple):
    """The arguments of a call: their form, and the tensors and the timestep, which differ between calls of a form."""

    form: CallForm
    tensors: list[Tensor]
    timestep: Tensor | float

    @classmethod
    def of(cls, named: dict[str, Any]) -> "Arguments | None":
        """The arguments by name, without return_dict; None if no graph can take them."""
        x, t = named.get("sample"), named.get("timestep")
        if not isinstance(x, Tensor) or not (isinstance(t, Tensor) or is_real(t)):
            return None
        if isinstance(t, Tensor) and (t.ndim > 1 or t.dtype == torch.bool):
            return None
        if isinstance(t, Tensor) and t.ndim == 0 and t.device.type == "cpu":
            t = t.item()
        if isinstance(t, Tensor) and t.device != x.device:
            return None
        leaves, spec = tree_flatten({**named, "timestep": None})
        described: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                plain = type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided
                if not plain or leaf.device != x.device:
                    return None
                described.append((leaf.shape, leaf.dtype, leaf.stride()))
            elif leaf is None or isinstance(leaf, bool | int | float | str):
                described.append((type(leaf), leaf))
            else:
                return None
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        t_shape = tuple(t.shape) if isinstance(t, Tensor) else ()
        form = CallForm(spec, tuple(described), t_shape, x.device, autocast)
        return cls(
            form, [leaf for leaf in leaves if isinstance(leaf, Tensor)], t if isinstance(t, Tensor) else float(t)
        )


class Graph:
    """The forward of a network on buffers for calls of one form."""

    def __init__(self, forward: Network, arguments: Arguments):
        self.form = arguments.form
        device = self.form.device
        self.buffers = [torch.empty_like(x, requires_grad=False) for x in arguments.tensors]
        # diffusers makes float32 of every timestep
        self.t = torch.empty(self.form.t_shape, dtype=torch.float32, device=device)
        self.output: Any = None
        self.replay = Replay(PreparedModel(forward, (), 1, AsSet(device, "fp32"), "graph"), 1, capture=True)
        self.order = StreamOrder(device)

    @contextmanager
    def working(self) -> Iterator[None]:
        """The context in which `prepare` and calls must be made."""
        held = (*self.buffers, self.t, *([self.output] if isinstance(self.output, Tensor) else []))
        with plain_modes(self.form.device), self.order.on_current_stream(held):
            yield

    def prepare(self, arguments: Arguments) -> None:
        """Capture, unless this was done and the network is the same."""
        self.replay.prepare(self._run, partial(self._load, arguments), (torch_settings(), float32_settings()))

    def __call__(self, arguments: Arguments) -> Tensor:
        """What the forward returns for these arguments, a new tensor."""
        self._load(arguments)
        self.replay(self._run)
        return self.output.clone()

    def _load(self, arguments: Arguments) -> None:
        if isinstance(arguments.timestep, Tensor):
            self.t.copy_(arguments.timestep)
        else:
            self.t.fill_(arguments.timestep)
        torch._foreach_copy_(self.buffers, arguments.tensors)

    def _run(self, network: Network | None) -> None:
        tensors = iter(self.buffers)
        leaves = [value if isinstance(kind, type) else next(tensors) for kind, value, *_ in self.form.leaves]
        named = {**tree_unflatten(leaves, self.form.spec), "timestep": self.t}
        dtype = self.form.autocast
        # autocast's cache would keep the current weights, and a graph would always use those
        autocast = torch.autocast(self.form.device.type, dtype, cache_enabled=False) if dtype else nullcontext()
        network = self.replay.prepared.plain_forward if network is None else network
        with autocast:
            self.output = network(**named, return_dict=False)[0]


class AsSet(Compute):
    """Computes in the precision of torch's settings, instead of setting them."""

    def arithmetic(self) -> Any:
        return arithmetic_as_set(self.device)


class Graphs:
    """The graphs of a network.

    Attributes:
        kept: the last used one last.
        seen: forms of calls that were made once.
        refused: forms that cannot be captured.
    """

    def __init__(self, unet: nn.Module):
        self.forward: Network = partial(_forward, ref(unet))  # graphs must not keep their network alive
        self.kept: list[Graph] = []
        self.seen: deque[CallForm] = deque(maxlen=REMEMBERED)
        self.refused: deque[CallForm] = deque(maxlen=REMEMBERED)

    def take(self, arguments: Arguments) -> Graph | None:
        """The graph for a call; None: diffusers' forward serves it."""
        form = arguments.form
        for graph in self.kept:
            if graph.form == form:
                self.kept.remove(graph)
                self.kept.append(graph)
                return graph
        if form in self.refused:
            return None
        if form not in self.seen:
            self.seen.append(form)
            return None
        del self.kept[: max(0, len(self.kept) + 1 - KEPT)]
        with plain_modes(form.device):
            self.kept.append(Graph(self.forward, arguments))
        return self.kept[-1]

    def refuse(self, graph: Graph) -> None:
        """Free a graph, and make none for calls of its form."""
        self.kept.remove(graph)
        self.refused.append(graph.form)


class Calls(Diverted):
    """Takes the place of a network's forward in `capturing`."""

    def __init__(self, unet: Any):
        self.unet, self.kind = unet, cast(Any, type(unet))
        update_wrapper(self, unet.forward)  # the same signature
        self.thread = threading.get_ident()
        self.can_be_captured: bool | None = None  # not known before the first call on a GPU
        self.prepared: list[Graph] = []  # compared with the network in this context
        self.parts: list[tuple[dict[str, Any], str, Any]] = []  # (owner, name, parameter, buffer or module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What diffusers' forward returns."""
        named = dict(zip(_names(self.kind), args, strict=False)) | kwargs
        return_dict = named.pop("return_dict", True)
        output = self._replayed(named)
        if output is None:
            return self.kind.forward(self.unet, *args, **kwargs)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def _replayed(self, named: dict[str, Any]) -> Tensor | None:
        """The output of a graph, or None if diffusers' forward has to run."""
        if threading.get_ident() != self.thread or torch.is_grad_enabled():
            return None
        arguments = Arguments.of(named)
        if arguments is None or not is_capturable(arguments.form.device):
            return None
        if self.can_be_captured is None:
            self.can_be_captured = can_be_captured(self.unet)
        if not self.can_be_captured:
            return None
        graphs = _graphs.setdefault(self.unet, Graphs(self.unet))
        graph = graphs.take(arguments)
        if graph is None:
            return None
        if any(owner.get(name) is not part for owner, name, part in self.parts):
            self.prepared.clear()
        with graph.working():
            if graph not in self.prepared:
                try:
                    graph.prepare(arguments)
                except Exception as error:  # of the capture: another call of this form has succeeded
                    graphs.refuse(graph)
                    warn_of_forward(self.unet, str(error).partition("\n")[0] or type(error).__name__)
                    return None
                self.prepared = [*(kept for kept in self.prepared if kept in graphs.kept), graph]
                self.parts = _parts(self.unet)
            return graph(arguments)


def _forward(unet: "ref[Any]", *args: Any, **kwargs: Any) -> Any:
    """diffusers' forward of a network."""
    module: Any = unet()
    return type(module).forward(module, *args, **kwargs)


def _parts(unet: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """(owner, name, part) of all parameters, buffers and modules of a network."""
    owners = (owner for m in unet.modules() for owner in (m._parameters, m._buffers, m._modules))
    return [(owner, name, part) for owner in owners for name, part in owner.items()]


@lru_cache
def _names(kind: Any) -> tuple[str, ...]:
    """The names of the arguments of a network's forward. Args: kind: its class."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
