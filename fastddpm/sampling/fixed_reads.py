"""What a CUDA graph fixes besides its arguments: addresses, numbers, functions; and whether they are the same now."""

from collections.abc import Callable
from numbers import Number
from types import FunctionType
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddpm.networks.obstacles import HOOKS, global_hooks
from fastddpm.sampling.reachable import Path, reachable

MOST_COMPARED = 1 << 16  # bytes of an array whose values are compared, not only its address

Run = Callable[[Callable[..., Any]], None]  # does the work once, with the given function as the network
Place = tuple[Any, ...]  # where a tensor is, and how it is read


class FixedReads:
    """What a captured network reads besides its arguments.

    Every module, tensor, function and number that the network can reach from Python is compared before each batch: one
    that was replaced, or is viewed with other strides, makes the graph stale. A network that reads memory which cannot
    be reached, as in a library's own cache, is called once before each batch instead, to see what it reads then.

    Args:
        model: the network, which was called before, so that it has made what it keeps.
        run: calls it once.
        device: where it computes.
    Raises: ValueError: the network reads a tensor that it replaces in each call.
    """

    def __init__(self, model: Callable[..., Any], run: Run, device: torch.device):
        self.model, self.device = model, device
        before = self._reachable()
        self.places = self._read(run)
        after = self._reachable()
        self.known = before.keys() | after.keys()
        self.held = {path: what for path, what in before.items() if after.get(path) == what}  # not what a call replaces
        storages = {_storage(x) for path, x in reachable(model) if isinstance(x, Tensor) and path in self.held}
        self.all_held = storages.issuperset(self.places.values())
        if not self.all_held and self._read(run) != self.places:
            raise ValueError(
                "engine: a step of this network cannot be captured: it reads a tensor that it replaces in each call, "
                "and a CUDA graph would always read the first one; change the tensor in place, or use engine='eager'"
            )

    def are_current(self, run: Run) -> bool:
        """Whether the network would read the same memory now. Does not wait for a GPU."""
        now = self._reachable()
        if any(now.get(path) != what for path, what in self.held.items()):
            return False
        for path in now.keys() - self.known:
            is_record = isinstance(path[-1], int) and isinstance(now[path], Number | str)  # in a list that grows
            if not is_record:
                return False
        return self.all_held or self._read(run) == self.places

    def _reachable(self) -> dict[Path, Any]:
        """Each module, function and number that the network can reach, and the place of each tensor and array."""
        found: dict[Path, Any] = {("all modules", hooks): global_hooks(hooks) for hooks in HOOKS}
        for path, thing in reachable(self.model):
            if isinstance(thing, Tensor):
                found[path] = self._place(thing)
            elif isinstance(thing, np.ndarray):  # of the host, so a graph keeps its numbers
                content = thing.tobytes() if thing.nbytes <= MOST_COMPARED else None
                found[path] = thing.ctypes.data, thing.shape, thing.strides, thing.dtype, content
            elif isinstance(thing, nn.Module | FunctionType):
                found[path] = ref(thing)  # not to keep the network alive
            else:
                found[path] = thing
        return found

    def _read(self, run: Run) -> dict[Place, int]:
        """The places that the network reads in one call, and the storage of each."""
        reads = _Reads(self.model, self._place)
        run(reads.call)
        return reads.places

    def _place(self, x: Tensor) -> Place:
        # a number on the host is an argument of a launch, which a graph keeps
        value = repr(x.item()) if x.ndim == 0 and x.device.type == "cpu" != self.device.type else None
        strides = x.stride() if x.layout == torch.strided else x.layout
        return _address(x) if value is None else value, x.shape, strides, x.dtype


class _Reads(TorchDispatchMode):
    """Notes which memory a network reads that is neither an argument of the call nor made in it."""

    def __init__(self, network: Callable[..., Any], place: Callable[[Tensor], Place]):
        super().__init__()
        self.network, self.place = network, place
        self.places: dict[Place, int] = {}
        self.made: set[int] = set()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.made = {_storage(x) for x in _tensors((args, kwargs))}
        with self:
            return self.network(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # whose argument was just made, by torch.tensor and the like
            for x in _tensors((args, kwargs)):
                if (storage := _storage(x)) not in self.made:
                    self.places[self.place(x)] = storage
        out = func(*args, **kwargs)
        self.made.update({_storage(x) for x in _tensors(out)}.difference(self.places.values()))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _storage(x: Tensor) -> int:
    return _address(x, storage=True)


def _address(x: Tensor, *, storage: bool = False) -> int:
    """The address of a tensor or of its storage; of a tensor that has none, as a sparse one, a number of its own."""
    try:
        return (x.untyped_storage() if storage else x).data_ptr() or id(x)
    except RuntimeError:
        return id(x)
