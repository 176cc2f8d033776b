"""The modules and tensors that a network can reach from Python: through closures, attributes, containers and globals.

A network may be any callable: a module, a function that calls one, a bound method, a `functools.partial`, an object.
Its modules must be in evaluation mode while it samples, and a CUDA graph of it reads its tensors at their addresses.
"""

import inspect
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import islice
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[Any, ...]  # the names of attributes, variables and items that lead to an object

LIMIT = 10_000  # objects besides modules and tensors: a network may refer to a whole data set

_LEAVES = frozenset({type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device})
_INTERNAL = vars(nn.Module()).keys() - {"_forward_hooks", "_forward_pre_hooks"}
# packages whose functions and objects hold nothing of the user's
_FOREIGN = {"fastddpm", "torch", "numpy", *sys.stdlib_module_names} - {"collections", "functools", "types"}


def reachable(model: Any) -> Iterator[tuple[Path, nn.Module | Tensor]]:
    """Yields (path, module or tensor), near ones first; one that is held at several places comes once for each."""
    waiting, seen, others = deque[tuple[Path, Any]]([((), model)]), set(), 0
    while waiting and others < LIMIT:
        path, thing = waiting.popleft()
        if isinstance(thing, Tensor):
            yield path, thing
            continue
        is_module = isinstance(thing, nn.Module)
        if is_module:
            yield path, thing
        if id(thing) not in seen:
            seen.add(id(thing))
            others += not is_module
            parts = _parts_of_module(thing) if is_module else islice(_parts(thing), LIMIT)
            waiting.extend([((*path, name), part) for name, part in parts if not _is_leaf(part)])


def modules(model: Any) -> list[nn.Module]:
    """All modules that a network can reach, with their submodules, each once."""
    found = {id(thing): thing for _, thing in reachable(model) if isinstance(thing, nn.Module)}
    return list(found.values())


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that a network can reach, by the names that lead to them."""
    return {".".join(map(str, path)): x for path, x in reachable(model) if isinstance(x, nn.Parameter)}


def _parts_of_module(module: nn.Module) -> list[tuple[str, Any]]:
    """(name, object) for what a module holds: its parts, its own attributes, and what its `forward` names."""
    parts: list[tuple[str, Any]] = [*module._modules.items(), *module._parameters.items(), *module._buffers.items()]
    for name, value in list(vars(module).items()):
        if type(value) not in _LEAVES and name not in _INTERNAL:
            parts.append((name, value))
    if not _is_foreign(type(module).__module__):
        parts.append(("forward", type(module).forward))
    return parts


def _parts(thing: Any) -> Iterator[tuple[Any, Any]]:
    """(name, object) for what an object holds."""
    if isinstance(thing, dict):
        yield from list(thing.items())
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        yield from enumerate(tuple(thing))
    elif isinstance(thing, FunctionType):
        yield from _variables(thing)
    elif isinstance(thing, MethodType):
        yield from (("__self__", thing.__self__), ("__func__", thing.__func__))
    elif isinstance(thing, partial):
        yield from (("func", thing.func), ("args", thing.args), ("keywords", thing.keywords))
    elif isinstance(thing, weakref.ref):
        yield "()", thing()
    elif not isinstance(thing, type | ModuleType) and not _is_foreign(type(thing).__module__):
        yield from _attributes(thing)


def _variables(function: FunctionType) -> Iterator[tuple[Any, Any]]:
    """What a function refers to: variables of its closure, defaults, attributes, and globals that its code names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != CellType():  # an empty cell is that of a variable not assigned yet
            yield name, cell.cell_contents
    yield from enumerate(function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    yield from list(vars(function).items())
    if _is_foreign(function.__globals__.get("__name__")):
        return
    names = _names(function.__code__)
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and not _is_foreign(value.__name__):
            yield from (((name, inner), vars(value)[inner]) for inner in names if inner in vars(value))
        elif not isinstance(value, type):
            yield name, value


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, and those of its class that its `__call__` names."""
    kind = type(thing)
    yield from list(getattr(thing, "__dict__", {}).items())
    for name in (name for base in kind.__mro__ for name in base.__dict__.get("__slots__", ())):
        if not name.startswith("__"):
            yield name, getattr(thing, name, None)
    call = getattr(kind, "__call__", None)  # noqa: B004
    if isinstance(call, FunctionType):
        yield "__call__", call
        for name in _names(call.__code__):
            value = inspect.getattr_static(kind, name, None)
            yield name, value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _is_leaf(thing: Any) -> bool:
    return type(thing) in _LEAVES or (type(thing) is tuple and _LEAVES.issuperset(map(type, thing)))


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[str, ...]:
    """The names of globals and attributes in a function's code, and in that of functions within it."""
    inner = (name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant))
    return *code.co_names, *inner


@lru_cache(maxsize=4096)
def _is_foreign(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _FOREIGN
