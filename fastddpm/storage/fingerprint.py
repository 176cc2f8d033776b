"""The fingerprint that decides whether a job may resume: weights, code, device and versions, which decide its bits."""

import functools
import hashlib
import importlib.metadata
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from numbers import Number
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm._version import __version__

# the methods of nn.Module that decide what a module computes; libraries add others, as transformers does smart_apply
CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattribute__", "__getattr__", "forward")
_VERSIONED = ("torch", "fastddpm")  # packages whose versions stand for their code
_GOLDEN, _FACTOR = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)
_OF_MODULES = vars(nn.Module()).keys()


def weights_sha256(network: nn.Module) -> str:
    """Hexadecimal SHA-256 of a network: its repr, and the name, shape, dtype and values of parameters and buffers.

    Other attributes of a module count only if its repr shows them.

    Raises: ValueError: a tensor has no values, or they cannot be read.
    """
    digest = hashlib.sha256(_without_addresses(repr(network)).encode())
    for name, value in _tensors(network):
        content = _bits(value).cpu().numpy().data
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(content)
    return digest.hexdigest()


def weights_sums(network: nn.Module) -> list[tuple[str, torch.Size, torch.dtype, int]]:
    """Name, shape, dtype and a sum over the bits of each parameter and buffer: a quick look at whether one has changed.

    Each value counts by its place, so that values that change places change the sum. A device adds up its own weights;
    only the sums are copied.
    """
    sums = []
    for name, value in _tensors(network):
        bits = _bits(value)
        if len(bits) % 8 == 0 and bits.storage_offset() % 8 == 0:
            bits = bits.view(torch.int64)
        # of each value and its place a number in which every bit of them counts, as in SplitMix64
        mixed = torch.arange(len(bits), dtype=torch.int64, device=bits.device).mul_(_GOLDEN).add_(bits)
        mixed.bitwise_xor_(mixed >> 30).mul_(_FACTOR)
        mixed.bitwise_xor_(mixed >> 27)
        total = mixed.sum()
        sums.append((name, value.shape, value.dtype, total))
    return [(name, shape, dtype, int(total)) for name, shape, dtype, total in sums]


def code_sha256(network: nn.Module, *, numbers: bool = False) -> dict[str, str]:
    """{where: hexadecimal digest} of the Python code of a network that is not from torch or fastddpm.

    This is the code of its classes and of functions put in their place, of hooks, and of what these call by name, with
    their constants, the values of their closures, and the numbers in callable objects. Other Python versions compile
    other code. Of installed packages the version counts, not the code.

    Args: numbers: numbers that are attributes of the user's own modules count, too.
    """
    found: dict[str, list[Any]] = defaultdict(list)
    for kind in dict.fromkeys(kind for module in network.modules() for kind in type(module).__mro__):
        names = CALLS if kind is nn.Module else list(vars(kind))
        if own := {name: vars(kind)[name] for name in names if _is_own(vars(kind).get(name))}:
            found[kind.__qualname__].append(own)
        package = kind.__module__.partition(".")[0]
        if package not in (*_VERSIONED, *sys.stdlib_module_names) and _has_version(package):
            found[package] = [installed(package)]
    for path, module in network.named_modules():
        for name, value in _settings(vars(module)).items():
            where = f"{path}.{name}".lstrip(".")
            if callable(value):
                found[where].append(value)
            elif numbers and name not in _OF_MODULES and _is_object(module):
                found["attributes"].append((where, value))
        if hooks := [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
            found[f"hooks of {path}".removesuffix(" of ")] += hooks
    modules = {id(module) for module in network.modules()}
    return {
        where: hashlib.sha256("\n".join(_described(what, modules)).encode()).hexdigest()[:16]
        for where, what in sorted(found.items())
    }


def value_sha256(value: Any) -> str:
    """A hexadecimal digest of tensors, arrays, plain values and functions, in any nesting.

    Of functions it is that of their code and of what they read: closures, and globals that are data or functions.
    """
    return hashlib.sha256("\n".join(_described(value, set(), deep=True)).encode()).hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and software of this process; on others a network may round differently."""
    versions = {"fastddpm": __version__, "torch": str(torch.__version__)}
    if device.type != "cuda":
        return {"device": f"cpu, {torch.backends.cpu.get_cpu_capability()}", "versions": versions}
    return {"device": torch.cuda.get_device_name(device), "versions": {**versions, "triton": installed("triton")}}


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that differ, with their value before, or None if they were missing; nested mappings field by field."""
    changed = {name: before.get(name) for name in {**before, **now} if before.get(name) != now.get(name)}
    for name, value in changed.items():
        if isinstance(value, dict) and isinstance(now.get(name), dict):
            changed[name] = differing(value, now[name])
    return changed


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(network.named_parameters(), network.named_buffers())


def _bits(value: Tensor) -> Tensor:
    """The bytes of a tensor, [n] uint8. Raises: ValueError: it has none that can be read."""
    try:
        if value.is_meta or value.is_quantized:
            raise ValueError("it is quantized, or on the meta device")
        return value.detach().contiguous().flatten().view(torch.uint8)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # sparse, quantized, not initialised ...
        what = f"a {value.layout} tensor, whose values cannot be read ({str(error).splitlines()[0]})"
        way_out = "want ordinary tensors, which tell whether a job is the same"
        raise ValueError(f"the network holds {what}; {way_out}") from error


def _settings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that decide what an object computes: numbers, functions and callable objects.

    Not tensors and lists, which may be records of earlier calls.
    """
    kinds = Number | functools.partial
    called = lambda value: _is_own(value) or (callable(value) and _is_object(value))
    return {k: v for k, v in attributes.items() if isinstance(v, kinds) or called(v)}


def _is_object(value: Any) -> bool:
    """Whether value is an object of the user's own class, or a namespace."""
    package = type(value).__module__.partition(".")[0]
    own = package not in sys.stdlib_module_names and not _has_version(package)
    return isinstance(value, SimpleNamespace) or (own and not isinstance(value, Mapping | list | tuple | set))


@functools.lru_cache(maxsize=4096)
def _has_version(package: str) -> bool:
    """Whether a version stands for the code of a package: it is torch, fastddpm, or installed, not a user's own."""
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    places = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    return package in _VERSIONED or file.startswith(places)


def _is_own(value: Any) -> bool:
    """Whether value is a function, or something that wraps one, from another package than torch and fastddpm."""
    function = _function(value)
    return function is not None and not _has_version(str(function.__globals__.get("__name__")).partition(".")[0])


def _function(value: Any) -> FunctionType | None:
    """The function in a method, property, partial, decorator or callable object; None: there is none in Python."""
    for _ in range(16):
        if isinstance(value, FunctionType) and not hasattr(value, "__wrapped__"):
            return value
        for name in ("__wrapped__", "__func__", "func", "fget"):
            inner = None
            with suppress(Exception):  # of the user's own __getattr__
                inner = None if isinstance(value, type) else getattr(value, name, None)
            if inner is not None:
                value = inner
                break
        else:
            return None
    return None


def _described(value: Any, seen: set[int], *, deep: bool = False) -> Iterator[str]:
    """Lines that change with what a value does or is.

    Args:
        seen: ids of modules, functions and objects that are described already.
        deep: also describe the tensors, lists and so on that functions read as globals and that objects hold, which in
            a network may be records of earlier calls.
    """
    if isinstance(value, Tensor):
        content = _bits(value).cpu().numpy().data
        yield f"{list(value.shape)} {value.dtype} {hashlib.sha256(content).hexdigest()}"
    elif isinstance(value, np.ndarray):
        yield f"{value.shape} {value.dtype} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif isinstance(value, nn.Module) and id(value) not in seen:
        seen.add(id(value))
        yield f"{weights_sha256(value)} {code_sha256(value)}"
    elif isinstance(value, Mapping):
        if deep:
            yield f"a dict of {len(value)}"
        for name in sorted(value, key=repr):
            yield repr(name)
            yield from _described(value[name], seen, deep=deep)
    elif isinstance(value, list | tuple):
        if deep:
            yield f"a list of {len(value)}"
        for part in value:
            yield from _described(part, seen, deep=deep)
    elif isinstance(value, set | frozenset):
        yield from sorted(map(repr, value))
    elif isinstance(value, CodeType):
        yield f"{value.co_code.hex()} {value.co_names} {value.co_freevars}"
        yield from _described(value.co_consts, seen)
    elif isinstance(value, functools.partial):
        yield from _described((value.func, value.args, value.keywords), seen, deep=deep)
    elif isinstance(value, MethodType):
        yield from _described((value.__func__, value.__self__), seen, deep=deep)
    elif (function := _function(value)) is not None:
        yield function.__qualname__
        if _is_own(function) and id(function) not in seen:
            seen.add(id(function))
            yield from _described_function(function, seen, deep=deep)
    else:
        yield from _described_object(value, seen, deep=deep)


def _described_object(value: Any, seen: set[int], *, deep: bool) -> Iterator[str]:
    simple = isinstance(value, Number | str | bytes | None)
    yield repr(value) if simple else type(value).__qualname__
    if _is_object(value) and not isinstance(value, nn.Module) and id(value) not in seen:
        seen.add(id(value))
        with suppress(AttributeError):  # it has none
            attributes = object.__getattribute__(value, "__dict__")
            yield from _described(attributes if deep else _settings(attributes), seen, deep=deep)
    if callable(value) and not isinstance(value, type | nn.Module):
        yield from _described(getattr(type(value), "__call__"), seen, deep=deep)  # noqa: B004, B009


def _described_function(function: FunctionType, seen: set[int], *, deep: bool) -> Iterator[str]:
    yield from _described((function.__code__, function.__defaults__, function.__kwdefaults__), seen, deep=deep)
    for cell in function.__closure__ or ():
        try:
            yield from _described(cell.cell_contents, seen, deep=deep)
        except ValueError:  # of a variable that is not assigned yet
            yield "empty"
    kinds: tuple[type, ...] = (bool, int, float, str, FunctionType)
    kinds += (Tensor, np.ndarray, list, tuple, dict, set, nn.Module) if deep else ()
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, kinds) or (deep and _is_object(value)):
            yield name
            yield from _described(value, seen, deep=deep)


def _without_addresses(text: str) -> str:
    """A repr without addresses in memory, which differ between processes."""
    return re.sub(" at 0x[0-9a-f]+", "", text)
