"""What a network can reach from Python: modules, tensors, functions and numbers, through closures, attributes, etc.

A network may be any callable: a module, a function that calls one, a bound method, a `functools.partial`, an object.
Its modules must be in evaluation mode while it samples. A CUDA graph of it keeps the addresses of its tensors, the
values of its numbers, and what its functions did.
"""

import dis
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache, partial
from itertools import islice
from numbers import Number
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Path = tuple[Any, ...]  # the names of attributes, variables and items that lead to an object

LIMIT = 10_000  # objects besides modules and tensors: a network may refer to a whole data set

_PLAIN = (type(None), Number, np.bool_, str, bytes, range, slice, torch.Size, torch.dtype, torch.device)
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_INTERNAL = vars(nn.Module()).keys() - {"_forward_hooks", "_forward_pre_hooks"}
# packages whose functions and objects hold nothing of the user's
_FOREIGN = {"fastddpm", "torch", "numpy", *sys.stdlib_module_names} - {"collections", "functools", "types"}
# packages whose objects may hold something of the user's, but whose functions are as they were installed
_LIBRARIES = {"accelerate", "diffusers", "huggingface_hub", "peft", "transformers"}


def reachable(model: Any) -> Iterator[tuple[Path, Any]]:
    """Yields (path, module, tensor, array, function or plain value), once for each place that holds it.

    All parts of a module are found; of the other objects those that are near, up to `LIMIT` of them.
    """
    near, far = deque[tuple[Path, Any]](), deque[tuple[Path, Any]]()  # modules; other objects
    seen, others = set[int](), 0
    near.append(((), model))
    while near or (far and others < LIMIT):
        path, thing = (near or far).popleft()
        if isinstance(thing, nn.Module):
            yield path, thing
            parts = _parts_of_module(thing)
        else:
            others += 1
            parts = islice(_parts(thing), LIMIT)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        for name, part in parts:
            inner = (*path, name)
            if isinstance(part, nn.Module):
                near.append((inner, part))
            elif isinstance(part, Tensor | np.ndarray):
                yield inner, part
            elif _is_plain(part):
                others += not isinstance(thing, nn.Module)
                yield inner, part
            elif len(far) < LIMIT:
                if isinstance(part, _FUNCTIONS):
                    yield inner, part
                far.append((inner, part))


def modules(model: Any) -> list[nn.Module]:
    """All modules that a network can reach, with their submodules, each once."""
    found = {id(thing): thing for _, thing in reachable(model) if isinstance(thing, nn.Module)}
    return list(found.values())


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that a network can reach, by the names that lead to them."""
    return {".".join(map(str, path)): x for path, x in reachable(model) if isinstance(x, nn.Parameter)}


def _parts_of_module(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, object) for what a module holds: its parts, its own attributes, and its class."""
    yield from (*module._modules.items(), *module._parameters.items(), *module._buffers.items())
    yield from ((name, value) for name, value in list(vars(module).items()) if name not in _INTERNAL)
    yield "class", type(module)


def _parts(thing: Any) -> Iterator[tuple[Any, Any]]:
    """(name, object) for what an object holds."""
    if isinstance(thing, dict):
        yield from list(dict.items(thing))  # not the `items` of a subclass, which may be the user's own
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
    elif isinstance(thing, staticmethod | classmethod):
        yield "__func__", thing.__func__
    elif isinstance(thing, property):
        yield "fget", thing.fget
    elif isinstance(thing, type):
        for base in thing.__mro__:
            if not _is_foreign(base.__module__):
                yield from ((name, x) for name, x in list(vars(base).items()) if name == "__call__" or name[:2] != "__")
    elif not isinstance(thing, ModuleType) and not _is_foreign(type(thing).__module__):
        yield from _attributes(thing)


def _variables(function: FunctionType) -> Iterator[tuple[Any, Any]]:
    """What a function refers to: variables of its closure, defaults, attributes, and globals that its code names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != CellType():  # an empty cell is that of a variable not assigned yet
            yield name, cell.cell_contents
    yield from enumerate(function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    yield from list(vars(function).items())
    module = function.__globals__.get("__name__")
    if _is_foreign(module) or _is_library(module):
        return
    for name, *inner in _globals(function.__code__):
        value, path = function.__globals__.get(name), name
        while isinstance(value, ModuleType) and not _is_foreign(value.__name__) and inner:
            value, path = vars(value).get(inner[0]), f"{path}.{inner.pop(0)}"
        yield path, value
        if isinstance(value, ModuleType) and not _is_foreign(value.__name__):  # called by another name
            names = (name for name in function.__code__.co_names if name in vars(value))
            yield from ((f"{path}.{name}", vars(value)[name]) for name in names)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, and its class."""
    with suppress(AttributeError):  # without the user's own __getattribute__ and __getattr__
        yield from list(object.__getattribute__(thing, "__dict__").items())
    for slots in (base.__dict__.get("__slots__", ()) for base in type(thing).__mro__):
        for name in (slots,) if isinstance(slots, str) else slots:
            with suppress(AttributeError):  # not assigned yet
                if not name.startswith("__"):
                    yield name, object.__getattribute__(thing, name)
    yield "class", type(thing)


def _is_plain(thing: Any) -> bool:
    """Whether an object is a plain value: a number, a string, ..., or a tuple of such."""
    return isinstance(thing, _PLAIN) or (type(thing) is tuple and all(isinstance(item, _PLAIN) for item in thing))


@lru_cache(maxsize=4096)
def _globals(code: CodeType) -> tuple[tuple[str, ...], ...]:
    """The globals that a function's code and functions within it read, each with the attributes taken of it at once."""
    found: list[tuple[str, ...]] = []
    extends = False
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.append((instruction.argval,))
            extends = True
        elif extends and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found[-1] += (instruction.argval,)
        elif instruction.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL"):
            extends = False
    inner = (name for constant in code.co_consts if isinstance(constant, CodeType) for name in _globals(constant))
    return tuple(dict.fromkeys([*found, *inner]))


@lru_cache(maxsize=4096)
def _is_foreign(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _FOREIGN


@lru_cache(maxsize=4096)
def _is_library(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _LIBRARIES
